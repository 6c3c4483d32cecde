"""Which layers stay float under a latency, by clocks whose figures are known: what is chosen follows from these."""

import itertools

import pytest
import torch

from compress import models
from compress.errors import UserError
from compress.quantization import Measures, QuantizedModel, Quantizer
from compress.quantization.activations import input_quantizers
from compress.quantization.latency import AIM, SURE, LatencySearch, Runtime, as_patterns, limit_ms
from compress.quantization.options import silent

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FLOAT = 10.0
QUANTIZER = Quantizer(bits=[8], activation_bits=8, latency="9.5ms")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.build("resnet8", 10).eval()


@pytest.fixture(scope="module")
def saves(network):
    """Milliseconds that each layer saves on integers, the third one less than none."""
    names = [*QUANTIZER(network, [IMAGES], 8).layers]
    return {name: -0.1 if number == 2 else 0.1 * (1 + number % 4) for number, name in enumerate(names)}


def clock(saves, extra=lambda names: 0.0):
    """A runtime in which each layer on integers saves what it does; `extra` is what they take longer together."""

    def milliseconds(network):
        names = [*network.layers] if isinstance(network, QuantizedModel) else []
        return FLOAT - sum(saves[name] for name in names) + extra(names)

    return Runtime("clock", lambda networks: [milliseconds(network) for network in networks])


def search(network, latency, runtime):
    return LatencySearch(QUANTIZER, network, [IMAGES], 8, latency, runtime)


def test_the_fewest_layers_go_on_integers_that_keep_the_latency_those_first_that_save_most_for_what_they_change(
    network, saves
):
    found = search(network, "9.3ms", clock(saves))
    third = list(saves)[2]
    assert found.saved_ms == pytest.approx(saves)
    worth = [saves[name] / found._divergence(name) for name in found.order]
    assert worth == sorted(worth, reverse=True)
    assert {*found.order} == saves.keys() - {third}
    choices = [*found.floats()]
    integers = [saves.keys() - choice for choice in choices]
    assert integers[0] == {*found.order[: len(integers[0])]}
    assert FLOAT - sum(saves[name] for name in integers[0]) <= AIM * 9.3
    assert FLOAT - sum(saves[name] for name in found.order[: len(integers[0]) - 1]) > AIM * 9.3
    assert all(fewer < more for fewer, more in itertools.pairwise(integers))
    assert choices[-1] == [third]


@pytest.mark.parametrize(("latency", "limit"), [("1.25x", FLOAT / 1.25), ("8.5ms", 8.5), ("8800us", 8.8)])
def test_speedups_and_times_are_kept(network, saves, latency, limit):
    found = search(network, latency, clock(saves))
    kept = next(found.floats())
    taken = FLOAT - sum(value for name, value in saves.items() if name not in kept)
    assert taken <= limit
    assert found.keeps(found._with(saves.keys() - kept)) == (taken <= SURE * limit)
    assert not found.keeps(found._with([next(iter(saves))]))


def test_all_layers_are_taken_where_only_all_together_are_fast_enough(network, saves):
    mixed = clock(saves, lambda names: 3.0 * (0 < len(names) < len(saves)))
    found = search(network, "9.3ms", mixed)
    assert [*found.floats()][-1] == []


def test_one_choice_is_tried_where_the_fastest_hardly_keeps_it(network, saves):
    fastest = FLOAT - sum(saved for saved in saves.values() if saved > 0)
    found = search(network, f"{fastest / (0.5 + SURE / 2)}ms", clock(saves))
    assert [*found.floats()] == [[list(saves)[2]]]


def test_what_cannot_be_kept_and_what_float_keeps_is_refused(network, saves):
    least = FLOAT - sum(value for value in saves.values() if value > 0)
    with pytest.raises(
        UserError, match=rf"latency: found 1ms, at most 1 ms, but {least:.3g} ms is the least .* in clock here"
    ):
        search(network, "1ms", clock(saves)).check()
    # Once it is trained it is not lost, should the machine have become a slower one.
    assert [*search(network, "1ms", clock(saves)).floats()] == [[list(saves)[2]]]
    with pytest.raises(UserError, match=r"latency: found 11ms, which the float32 network keeps with 10 ms in clock"):
        search(network, "11ms", clock(saves)).check()
    slower = dict.fromkeys(saves, -0.1)
    with pytest.raises(UserError, match="but 11 ms is the least"):
        search(network, "1.1x", clock(slower)).check()
    search(network, f"{least + 0.01}ms", clock(saves)).check()


def test_a_layer_that_stays_float_has_its_own_weight_and_input(network, saves):
    found = search(network, "9.3ms", clock(saves))
    first, *others = saves
    partly = found._with(others)
    assert {*partly.layers} == {*others} == {*input_quantizers(partly.model)}
    assert f"{first}.weight" in partly.float_state
    analog = found.prepared.analog
    assert torch.equal(partly.model.get_submodule(first).weight, analog.get_submodule(first).weight)
    only = Quantizer(activation_bits=8, skip=as_patterns([first]))
    assert {*only(network, [IMAGES], 8).layers} == {*others}


def test_a_quantizer_makes_one_network_and_says_what_its_layers_save(network, saves):
    [variant] = QUANTIZER.variants(network, [IMAGES], measured(clock(saves)), silent)
    assert (variant.word, variant.bits, variant.levels) == ("latency", 8, 256)
    assert variant.saved_ms == pytest.approx(saves)
    assert variant.model.skipped
    assert {*variant.model.skipped.values()} == {"latency: float, for 9.5ms"}
    assert variant.model.skipped.keys() | variant.model.layers.keys() == saves.keys()


def test_more_layers_follow_while_the_network_that_will_be_written_is_too_slow(network, saves):
    def later(networks):
        """What was not made for the search takes longer than that."""
        made = [{*getattr(each, "skipped", {}).values()} <= {"is float"} for each in networks]
        return [time + 1.4 * (not one) for time, one in zip(clock(saves).latencies_ms(networks), made, strict=True)]

    [first] = QUANTIZER.variants(network, [IMAGES], measured(clock(saves)), silent)
    [found] = QUANTIZER.variants(network, [IMAGES], measured(Runtime("clock", later)), silent)
    assert first.model.layers.keys() < found.model.layers.keys()


def measured(runtime):
    return Measures(lambda quantized: 0, 0, runtime=runtime)


@pytest.mark.parametrize("latency", ["", "fast", "0ms", "-1ms", "1", 2, "1x", "0.5x", "2 MB", "nanms", "1e400ms"])
def test_what_is_no_latency_is_refused(latency):
    with pytest.raises(
        UserError, match=r"^latency: found .*; accepted: a time above 0, such as 1.5ms or 800us, or a speedup"
    ):
        limit_ms(latency, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "10kB"}, "budget: found it beside latency"),
        ({"max_drop": 1.0}, "max_drop: found it beside latency"),
        ({"rates": [2.0]}, "rates: found it beside latency"),
        ({"bits": [8, 4]}, r"bits: found \[8, 4\] beside latency; accepted: one width, or null for 8"),
        ({"bits": []}, r"bits: found \[\] beside latency"),
        ({"activation_bits": None}, "activation_bits: found null beside latency"),
        ({"latency": "soon"}, "latency: found 'soon'"),
    ],
)
def test_options_that_a_latency_leaves_no_room_for_are_refused(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Quantizer(**{"activation_bits": 8, "latency": "2x", **options})
