"""Calls of one engine from several threads: they share its rounds, and none waits for another's sequences.

Every trajectory is compared with the plain reference decoder.
"""

import threading
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from engines import DYNAMIC, NO_STOP, assert_equal, assert_weights_get_in_between_the_steps
from synthetic import make_model, make_requests

from actors.engine import CancelledError
from actors.torch_engine import TorchEngine


def test_cancelled_groups_fail_the_calls_that_wait_for_them_and_no_others(model, twin):
    engine = TorchEngine(model, max_batch=3)
    requests = make_requests([5, 9, 13, 17, 21])
    streams = [engine.stream(requests[:3], NO_STOP), engine.stream(requests[3:], DYNAMIC)]
    engine.cancel({0, 2, 99})
    with pytest.raises(CancelledError, match="its group was cancelled"):
        list(streams[0])
    for trajectory in streams[1]:
        assert_equal(trajectory, requests[trajectory.group_id], twin, model, DYNAMIC)
    assert engine.stats.sequences in (2, 3), "the third of the first call may have been decoded before it failed"
    engine.sleep()  # nothing is left behind


def test_streams_yield_what_ends_first_and_closing_one_gives_up_the_rest(model, twin):
    engine = TorchEngine(model)
    requests = [replace(r, max_new_tokens=n) for r, n in zip(make_requests([8, 8, 8]), (24, 4, 12), strict=True)]
    assert [t.group_id for t in engine.stream(requests, NO_STOP)] == [1, 2, 0]
    other = engine.stream(make_requests([9, 10], seed=4), DYNAMIC)
    stream = engine.stream(requests, NO_STOP)
    assert next(stream).group_id == 1
    with pytest.raises(RuntimeError, match="sequences are being decoded"):
        engine.sleep()
    stream.close()
    assert len(list(other)) == 2, "what others asked for goes on"
    engine.sleep()
    assert engine._cache.keys[0].numel() == 0
    assert_equal(engine.generate(requests, NO_STOP)[0], requests[0], twin, model, NO_STOP)


def test_pause_stops_decoding_and_weights_get_in_between_the_passes_of_a_busy_engine():
    engine = TorchEngine(make_model(seed=2))
    assert_weights_get_in_between_the_steps(engine, replace(NO_STOP, max_new_tokens=60), lambda: engine.stats.forwards)


def test_calls_from_several_threads_are_decoded_together(model, twin):
    engine = TorchEngine(model)
    calls = [(make_requests([5, 11, 20], seed=i), replace(DYNAMIC, block_size=b)) for i, b in enumerate((2, 4, 8, 16))]
    found = [None] * len(calls)

    def work(i):
        found[i] = engine.generate(*calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    with engine.paused():
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for (requests, decoding), trajectories in zip(calls, found):
        for request, trajectory in zip(requests, trajectories, strict=True):
            assert_equal(trajectory, request, twin, model, decoding)


def test_a_failed_pass_loses_what_was_under_way_and_nothing_else(model, twin, monkeypatch):
    engine = TorchEngine(model)
    calls, hidden = [], engine._decoder.hidden

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return hidden(*arguments)

    monkeypatch.setattr(engine._decoder, "hidden", failing)
    other = engine.stream(make_requests([6], seed=3), NO_STOP)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(make_requests([9, 12]), NO_STOP)
    with pytest.raises(RuntimeError, match="failed in another call, which took this call's sequences with it"):
        list(other)
    assert len(calls) == 4
    for request, trajectory in zip(make_requests([9, 12]), engine.generate(make_requests([9, 12]), DYNAMIC)):
        assert_equal(trajectory, request, twin, model, DYNAMIC)


STATIC = replace(NO_STOP, strategy="static", max_new_tokens=160)  # a token a step


def run_together(*work):
    threads = [threading.Thread(target=function) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_every_call_returns_right_after_its_own_last_sequence_ended(model):
    """Calls of 4 to 160 rounds, which all begin in the same one and are driven by any of them."""
    engine = TorchEngine(model)
    lengths = [160, 4, 8, 12, 40, 44, 80, 120]
    requests = [replace(r, max_new_tokens=n) for r, n in zip(make_requests([8] * 8), lengths, strict=True)]
    streams = [engine.stream([request], STATIC) for request in requests]
    back = {}

    def consume(length, stream):
        assert len(list(stream)) == 1
        back[length] = engine.stats.forwards

    run_together(*(lambda pair=pair: consume(*pair) for pair in zip(lengths, streams)))
    late = {length: back[length] - length for length in lengths}
    assert max(late.values()) <= 2, late


def test_a_pause_waits_for_the_present_round_alone(model, monkeypatch):
    """It is asked for in the middle of the tenth, while five other callers wait to drive the next."""
    engine = TorchEngine(model)
    hidden = engine._decoder.hidden
    streams = [engine.stream([request], STATIC) for request in make_requests([8] * 6)]
    seen = []

    def pause():
        with engine.paused():
            seen.append(engine.stats.forwards)

    pauser = threading.Thread(target=pause)

    def asking(*arguments):
        if engine.stats.forwards == 9:
            pauser.start()
            while not engine._pauses:
                pauser.join(0.001)
        return hidden(*arguments)

    monkeypatch.setattr(engine._decoder, "hidden", asking)
    run_together(*(lambda stream=stream: list(stream) for stream in streams))
    pauser.join(60)
    assert seen == [10]


def test_what_is_asked_for_inside_a_pause_of_ones_own_is_refused(model):
    engine = TorchEngine(model)
    with engine.paused(), pytest.raises(RuntimeError, match=r"nothing is decoded inside paused\(\): leave it"):
        engine.generate(make_requests([9]), DYNAMIC)
    engine.sleep()


@pytest.mark.parametrize("give_up", [lambda stream: stream.close(), lambda stream: None], ids=["closed", "dropped"])
def test_a_stream_that_nobody_begins_to_read_leaves_nothing_behind(model, give_up):
    engine = TorchEngine(model)
    give_up(engine.stream(make_requests([9, 10]), NO_STOP))
    engine.sleep()


@pytest.mark.parametrize("error", [torch.AcceleratorError("an illegal memory access"), torch.OutOfMemoryError("full")])
def test_an_engine_is_broken_after_an_error_of_its_device_and_not_for_want_of_memory(model, twin, monkeypatch, error):
    engine, requests = TorchEngine(model), make_requests([5, 9])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_denoise", Mock(side_effect=error))
        with pytest.raises(type(error)):
            engine.generate(requests, NO_STOP)
    assert engine.broken == isinstance(error, torch.AcceleratorError)
    if not engine.broken:
        for trajectory in engine.generate(requests, NO_STOP):
            assert_equal(trajectory, requests[trajectory.group_id], twin, model, NO_STOP)
