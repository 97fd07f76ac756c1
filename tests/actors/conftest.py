"""What the engine tests share."""

import pytest
import torch
from reference import plain_twin
from synthetic import make_model, save_model

from actors.vllm_engine import VllmEngine
from actors.vllm_serving import Serving
from tstar_ray.model import read_blueprint


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return make_model(seed=2)


@pytest.fixture(scope="module")
def twin(model):
    return plain_twin(model)


@pytest.fixture(scope="module")
def blueprint(model, tmp_path_factory):
    return read_blueprint(save_model(model, tmp_path_factory.mktemp("served")))


@pytest.fixture(scope="module")
def serve(blueprint):
    """Makes engines; one at a time, since vLLM keeps one process group for all of a process."""
    made = []

    def make(*, fresh=True, **settings):
        serving = Serving(**{"max_block": 32, "max_tokens": 300, "cache_gb": 2**-6} | settings)
        if made and (fresh or made[-1][0] != serving or made[-1][1].proof.version):
            made.pop()[1].close()
        if not made:
            made.append((serving, VllmEngine(blueprint, serving)))
        return made[-1][1]

    yield make
    if made:
        made.pop()[1].close()


@pytest.fixture
def engine(serve):
    """One that earlier tests may have used, with the start weights."""
    return serve(fresh=False)
