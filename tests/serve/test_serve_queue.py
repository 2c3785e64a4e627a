"""The line in which texts wait: batched over adapters, bounded, left when given up."""

import asyncio
import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from lora_sentiment.serve.batching import Queue
from lora_sentiment.serve.config import Limits
from lora_sentiment.serve.messages import RefusalError
from lora_sentiment.serve.metrics import Metrics
from tests.serve.fake_pool import FakePool, answer, make_adapter

ONE, TWO = make_adapter("one"), make_adapter("two", "abcde", factor=0.3)
TEXT = np.array([2, 5, 6, 3], dtype=np.int32)


def in_line(ask, pool=None, **limits):
    """Run `ask(queue, pool)` beside a running queue and return what it returns."""

    async def run():
        found = pool or FakePool(ONE, TWO)
        queue = Queue(
            found.compute, limits=Limits(**{"batch_wait_ms": 20.0, **limits}), metrics=Metrics()
        )
        running = asyncio.create_task(queue.run())
        try:
            return await ask(queue, found)
        finally:
            found.gate.set()
            running.cancel()
            queue.shut_down()

    return asyncio.run(run())


async def waits(queue, tokens):
    """Wait until so many tokens wait."""
    for _ in range(1000):
        if queue.num_tokens == tokens:
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"{queue.num_tokens} tokens wait, not {tokens}")


async def held_up(queue, pool):
    """Return a request that is being computed and stays so until the gate opens."""
    pool.gate.clear()
    pool.begun.clear()
    first = asyncio.create_task(queue.ask(ONE, [TEXT]))
    while not pool.begun.is_set():
        await asyncio.sleep(0.002)
    return first


def test_requests_for_several_adapters_are_computed_in_one_batch_each_by_its_own():
    async def ask(queue, pool):
        inputs = [TEXT, TEXT[:3]]
        found = await asyncio.gather(
            queue.ask(ONE, inputs), queue.ask(TWO, inputs), queue.ask(ONE, inputs[:1])
        )
        for own, served in zip(found, (ONE, TWO, ONE), strict=True):
            for ids, logits in zip(inputs, own, strict=False):
                np.testing.assert_array_equal(logits, answer(served, ids.tolist()))
        return pool.batches

    assert in_line(ask) == [5]


def test_a_batch_holds_no_more_tokens_than_allowed_and_a_request_that_spans_several_keeps_its_order():
    async def ask(queue, pool):
        inputs = [np.array([2, i, 3], dtype=np.int32) for i in range(4, 11)]
        long, short = await asyncio.gather(queue.ask(TWO, inputs), queue.ask(ONE, [TEXT]))
        for ids, logits in zip(inputs, long, strict=True):
            np.testing.assert_array_equal(logits, answer(TWO, ids.tolist()))
        np.testing.assert_array_equal(short[0], answer(ONE, TEXT.tolist()))
        return pool.batches

    assert in_line(ask, batch_tokens=10) == [3, 3, 2]


def test_a_full_batch_does_not_wait_for_more():
    async def ask(queue, _):
        await asyncio.wait_for(queue.ask(ONE, [TEXT] * 4), timeout=30)

    in_line(ask, batch_tokens=16, batch_wait_ms=60_000.0)


def test_a_fault_of_the_queue_itself_refuses_those_who_wait_and_those_who_come(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("lora_sentiment.serve.batching._answer_requests", fail)

    async def ask(queue, _):
        waiting = [queue.ask(ONE, [TEXT]), queue.ask(TWO, [TEXT])]
        ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), timeout=30)
        with pytest.raises(RefusalError) as late:
            await queue.ask(ONE, [TEXT])
        return [error.kind for error in [*ended, late.value]]

    assert in_line(ask) == ["Unhealthy"] * 3


def test_the_time_to_wait_follows_the_speed_seen(monkeypatch):
    clock = SimpleNamespace(
        perf_counter=itertools.count(0, 0.25).__next__
    )  # a batch is begun, and has ended
    monkeypatch.setattr("lora_sentiment.serve.batching.time", clock)

    async def ask(queue, pool):
        await queue.ask(ONE, [TEXT])  # 1/16 s a token
        first = await held_up(queue, pool)
        second = asyncio.create_task(queue.ask(ONE, [TEXT] * 10))
        await waits(queue, 40)
        found = queue.estimate_wait()
        pool.gate.set()
        await asyncio.gather(first, second)
        return found

    assert in_line(ask) == 3  # 40 tokens, in whole seconds


def test_a_batch_that_cannot_be_computed_is_refused_and_logged_and_the_next_one_is_answered(caplog):
    async def ask(queue, pool):
        pool.fault = RuntimeError("no such kernel")
        found = await asyncio.gather(
            queue.ask(ONE, [TEXT]), queue.ask(ONE, [TEXT]), return_exceptions=True
        )
        assert [(error.kind, error.status) for error in found] == [("Backend", 503)] * 2
        assert len(await queue.ask(ONE, [TEXT])) == 1
        assert queue.num_tokens == 0

    with caplog.at_level(logging.ERROR, logger="lora_sentiment"):
        in_line(ask)
    assert "a batch of 2 texts could not be computed" in caplog.text
    assert "RuntimeError: no such kernel" in caplog.text


def test_an_adapter_that_cannot_be_computed_leaves_the_others_of_its_batch_answered():
    async def ask(queue, pool):
        compute = queue._compute

        def fail_for_two(served, encoded):
            if TWO in served:
                raise RuntimeError("no such kernel")
            return compute(served, encoded)

        queue._compute = fail_for_two
        return await asyncio.gather(
            *(queue.ask(own, [TEXT, TEXT]) for own in (ONE, TWO, ONE)), return_exceptions=True
        )

    first, fault, last = in_line(ask)
    assert (fault.kind, fault.status) == ("Backend", 503)
    for found in (*first, *last):
        np.testing.assert_array_equal(found, answer(ONE, TEXT.tolist()))


def test_an_iterator_that_ends_early_in_the_thread_is_a_fault_like_any_other():
    async def ask(queue, pool):
        pool.fault = StopIteration()
        async with asyncio.timeout(10):
            with pytest.raises(RefusalError, match="could not be computed"):
                await queue.ask(ONE, [TEXT])
            assert len(await queue.ask(ONE, [TEXT])) == 1

    in_line(ask)


def test_a_value_that_is_not_finite_is_the_fault_of_its_adapter_alone():
    broken = make_adapter("broken", factor=float("nan"))

    async def ask(queue, _):
        return await asyncio.gather(
            queue.ask(ONE, [TEXT]), queue.ask(broken, [TEXT]), return_exceptions=True
        )

    good, bad = in_line(ask)
    np.testing.assert_array_equal(good[0], answer(ONE, TEXT.tolist()))
    assert (bad.kind, bad.status) == ("Backend", 503)


def test_a_closed_line_takes_nothing_new_and_computes_what_waits_at_once():
    async def ask(queue, _):
        waiting = asyncio.create_task(queue.ask(ONE, [TEXT]))
        await waits(queue, 4)
        queue.close()
        with pytest.raises(RefusalError, match="is stopping"):
            queue.check(4)
        # What was let in before the stop, and only now has been tokenised.
        late = queue.ask(TWO, [TEXT])
        return len(await asyncio.wait_for(waiting, timeout=30)), len(await late)

    assert in_line(ask, batch_wait_ms=60_000.0) == (1, 1)


def test_a_request_is_computed_no_further_after_one_of_its_batches_failed():
    async def ask(queue, pool):
        pool.fault = RuntimeError("no such kernel")
        with pytest.raises(RefusalError, match="could not be computed"):
            await queue.ask(ONE, [TEXT] * 3)
        await queue.ask(TWO, [TEXT])
        return pool.batches

    assert in_line(ask, batch_tokens=4) == [1, 1]
