"""A name among Triton's backends, and nothing behind it.

vLLM's model runner v2 wants a Triton with a ``cpu`` backend before it starts on CPU; PyPI has none. The kernels that
it would compile are replaced by actors.vllm_plugin.cpu_kernels (or run by Triton's interpreter), so that a name is
enough.
"""
