import json

from nat_models.benchmark.case import Case


def test_a_record_states_the_whole_case():
    case = Case("nat_mini", "training", "eager", 8, "tf32", 384, "gemm", channels_last=False)
    assert json.loads(json.dumps(case.as_record())) == {
        "model": "nat_mini",
        "pass": "training",
        "execution": "eager",
        "batch_size": 8,
        "precision": "tf32",
        "input_size": [3, 384, 384],
        "attention_backend": "gemm",
        "channels_last": False,
    }


def test_images_have_the_models_own_size_by_default():
    assert Case("dinat_large_384", "inference", "eager", 1).image_shape == [3, 384, 384]
