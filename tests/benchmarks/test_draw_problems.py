import json

import draw_problems
from problem import Problem, load_problems


def test_the_committed_list_is_the_one_that_is_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(draw_problems, "FOLDER", tmp_path)
    draw_problems.main()
    assert json.loads((tmp_path / "paper.json").read_text())["problems"] == load_problems("paper")


def test_every_layer_of_the_zoo_is_in_the_list_with_as_many_images_as_can_be_measured():
    def layer(entry):
        return {name: entry[name] for name in ("map", "heads", "kernel_size", "dilation")}

    entries = [entry for entry in load_problems("paper") if entry["zoo"]]
    zoo = load_problems("zoo")
    assert len(entries) == len(zoo) == 44
    for entry in zoo:
        (found,) = [e for e in entries if layer(e) == layer(entry)]
        problem = Problem.of(found)
        assert draw_problems.is_measurable(problem)
        largest = found["batch"] == entry["batch"]
        assert largest or problem.elements > draw_problems.ELEMENTS[1] // 2


def test_a_layer_that_is_too_large_gets_half_or_a_quarter_of_the_images():
    def images(*map_and_heads):
        side, heads = map_and_heads
        layer = Problem((side, side), heads, 32, (7, 7), (1, 1), 128)
        return draw_problems.reduced(layer).batch

    assert [images(56, 4), images(56, 6), images(96, 6)] == [128, 64, 32]
