import inspect

import pytest

import neighborhood_attention


@pytest.mark.parametrize("name", neighborhood_attention.__all__)
def test_every_public_name_documents_its_arguments_or_names_who_does(name):
    public = getattr(neighborhood_attention, name)
    text = inspect.getdoc(public)
    assert text.splitlines()[0].endswith(".")
    assert len(inspect.signature(public).parameters) < 2 or "Args:" in text or "`" in text
