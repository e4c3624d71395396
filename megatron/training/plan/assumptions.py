"""What a plan takes for granted about devices, and what a user may say instead."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The devices of a run and what is asked of it.

    Attributes:
        device_memory: bytes of one device.
        headroom: share of them left to the driver, the collectives' own buffers and the
            allocator's gaps.
        peak_flops: floating-point operations a second of one device, dense, in the run's
            number format; None = times are not estimated.
        utilisation: share of them that the model's own operations get over the whole run
            (what is called MFU: recomputation, bubbles and waiting all lower it).
        tokens: to train on; None = what the configuration's steps make.
        ranks_per_node: devices that share the fast links.
        bandwidth: bytes a second that one rank sends; None = times are not estimated.
        on_cpu: ranks run on CPUs, whose kernels keep a little more.

    Raises:
        ConfigError: a number that cannot be.
    """

    device_memory: float = 80.0 * GIB
    headroom: float = 0.06
    peak_flops: float | None = 989e12
    utilisation: float = 0.4
    tokens: float | None = None
    ranks_per_node: int = 8
    bandwidth: float | None = None
    on_cpu: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        for flag, value in (
            ("--device-memory", self.device_memory),
            ("--peak-tflops", self.peak_flops),
            ("--tokens", self.tokens),
            ("--ranks-per-node", self.ranks_per_node),
            ("--bandwidth", self.bandwidth),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{flag} must be a number above 0")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(
                f"--utilisation is {self.utilisation}; it is a share between 0 and 1, such as 0.4"
            )

    @property
    def usable_memory(self) -> float:
        """Bytes of a device that a run may fill."""
        return self.device_memory * (1 - self.headroom)
