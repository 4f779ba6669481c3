"""The cache on Apple GPUs: `kv4.metal.mps` for tensors of PyTorch on device="mps", `kv4.mlx` for MLX's arrays.

`Cache` replaces the C++ core's Cache: the same policy and the same calls, arrays on the device. Its kernels are
the library's Metal sources, compiled on the user's machine by `torch.mps.compile_shader` or `mlx.fast.metal_kernel`.
"""
