"""Raw text in, ``.bin/.idx`` and sidecar out; and judging what is there.

:func:`~megatron.data.ingest.pipeline.preprocess` tokenises,
:func:`~megatron.data.ingest.overlap.overlap` compares two datasets,
:func:`~megatron.data.ingest.verify.verify_dataset` checks one against its sidecar.
"""
