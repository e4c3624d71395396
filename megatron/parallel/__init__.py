"""Where a rank stands, how ranks talk, and the layers that are split among them.

Topology is a value handed to whatever needs it; there are no process-global groups.
"""

from megatron.parallel.layout import Coordinates, Layout
from megatron.parallel.topology import Topology

__all__ = ["Coordinates", "Layout", "Topology"]
