"""What Triton looks for in a backend's compiler module."""

from triton.backends.compiler import BaseBackend

from tstar_triton_cpu.driver import _ABSENT


class CPUBackend(BaseBackend):
    """Compiles nothing."""

    @staticmethod
    def supports_target(target):
        return False

    def hash(self):
        return "tstar-triton-cpu"

    def parse_options(self, options):
        raise NotImplementedError(_ABSENT)

    def add_stages(self, stages, options, language=None):
        raise NotImplementedError(_ABSENT)

    def load_dialects(self, context):
        return None

    def get_module_map(self):
        return {}

    def pack_metadata(self, metadata):
        return metadata

    def get_codegen_implementation(self, options=None):
        return {}
