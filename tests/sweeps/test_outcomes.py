"""What is said of a job that has ended."""

from dataclasses import fields, replace

import pytest

from compress.results.tradeoff import Row
from compress.sweeps.outcomes import Outcome

ARGUMENTS = {field.name: None for field in fields(Row) if field.init}
FLOAT = Row(**ARGUMENTS | {"quantizer": "none", "test_accuracy": 0.5})


@pytest.mark.parametrize(("quantizer", "percent"), [("gpfq", "50.00"), ("lsq", "87.50")])
def test_the_accuracy_is_of_the_weights_that_were_trained(quantizer, percent):
    narrow = replace(FLOAT, quantizer=quantizer, test_accuracy=0.875)
    assert str(Outcome("finished", rows=(FLOAT, narrow))) == f"finished, {percent} % on test"
