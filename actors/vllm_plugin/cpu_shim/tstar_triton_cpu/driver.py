"""What Triton looks for in a backend's driver module."""

from triton.backends.driver import DriverBase

_ABSENT = "there is no Triton compiler for CPU here; set TRITON_INTERPRET=1 to interpret kernels"


class CPUDriver(DriverBase):
    """Never active."""

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        raise NotImplementedError(_ABSENT)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError(_ABSENT)
