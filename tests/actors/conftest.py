"""What the engine tests share."""

import pytest
import torch
from reference import plain_twin
from synthetic import make_model


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
