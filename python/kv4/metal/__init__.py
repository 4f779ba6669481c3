"""The cache on Apple GPUs through PyTorch: `KV4Cache` on device="mps" keeps its layers here.

`MetalCache` stands in for the C++ core's Cache: the same calls, tensors on the device. Its kernels are the library's
Metal sources, compiled on the user's machine by `torch.mps.compile_shader`.
"""

from .cache import MetalCache
from .host import Host, mps_host, why_not

__all__ = ["Host", "MetalCache", "mps_host", "why_not"]
