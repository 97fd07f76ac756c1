"""The pretended GPU objects to what a GPU objects to, so that what passes on it means something."""

import pytest
import torch
from pretend_cuda import CUDA, PretendCuda


@pytest.fixture
def cuda():
    with PretendCuda() as device, torch.inference_mode():
        yield device


def ones(*shape):
    return torch.ones(shape, device=CUDA)


def uploaded(data):
    return data.pin_memory().to(CUDA, non_blocking=True)


def captured(run, pool=None):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph, result


def test_numbers_are_computed_in_the_memory_that_a_gpu_would_use(cuda):
    data = torch.arange(6.0).view(2, 3).to(CUDA)
    assert (data.device, data.is_cuda) == (CUDA, True)
    data[:, 1] = data.sum()
    data[0].view(-1)[ones(1).long()] += 1
    assert (data @ data.T).tolist() == [[260.0, 250.0], [250.0, 259.0]]
    layer = torch.nn.Linear(3, 3)
    expected = layer(torch.ones(3))
    assert layer.to(CUDA)(ones(3)).tolist() == expected.tolist()


def test_operands_on_two_devices_are_an_error_but_for_single_numbers(cuda):
    assert (ones(2) + torch.tensor(2.0)).tolist() == [3.0, 3.0]
    for mixed in (lambda: ones(2) + torch.ones(2), lambda: torch.cat([torch.ones(2), ones(2)])):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            mixed()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x[[0, 2]],
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0, 2.0], device=CUDA),
        lambda x: torch.ones(2).to(CUDA),
        lambda x: torch.ones(2).pin_memory().to(CUDA),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_makes_the_host_wait_is_counted_and_is_no_part_of_a_graph(cuda, wait):
    data = ones(3)
    assert cuda.waits.total() == 0
    wait(data)
    assert cuda.waits.total() == 1
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing|would read this host memory"):
        captured(lambda: wait(data))


def test_what_the_host_does_not_wait_for_is_not_counted(cuda):
    data = ones(3)
    data[data.long()] = 2.0
    data.masked_fill_(data > 1, 0.0).expand(2, 3).sort(dim=-1)
    uploaded(torch.ones(3)).split([1, 2])
    assert (cuda.waits.total(), cuda.uploads) == (0, 1)


def test_a_graph_computes_when_it_is_replayed_from_what_its_memory_holds_then(cuda):
    source, total = ones(3), ones(1)
    graph, doubled = captured(lambda: (total.add_(source.sum()), (source * 2).view(-1, 1)[:2])[1])
    assert total.tolist() == [1.0], "nothing is computed while it is captured"
    assert doubled.isnan().all()
    source.copy_(uploaded(torch.tensor([1.0, 2.0, 3.0])))
    graph.replay()
    graph.replay()
    assert total.tolist() == [13.0]
    assert doubled.tolist() == [[2.0], [4.0]]
    assert graph.replays == 2
    with pytest.raises(RuntimeError, match="would read this host memory"):
        captured(lambda: uploaded(torch.ones(3)))


def test_a_replay_overwrites_what_other_graphs_of_its_pool_left(cuda):
    source, pool = ones(2), torch.cuda.graph_pool_handle()
    (first, a), (second, b), (other, c) = (captured(lambda: source + 1, of) for of in (pool, pool, object()))
    for graph in (other, first, second):
        graph.replay()
    assert a.isnan().all()
    assert b.tolist() == c.tolist() == [2.0, 2.0]


def test_outside_of_it_its_tensors_are_useless_and_pytorch_is_as_before():
    with PretendCuda():
        data = ones(2)
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available() or torch.version.cuda
    with pytest.raises(RuntimeError, match="outside of PretendCuda"):
        data + 1
