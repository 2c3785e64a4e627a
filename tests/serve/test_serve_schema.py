"""Whatever the OpenAPI document allows, and much that it does not: only answers that it names, never a 500."""

from collections import Counter
from urllib.request import urlopen

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.serve.fake_pool import FakePool, make_adapter, running

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
)

# What breaks the schema is refused by one of these; 413 is no default there.
REFUSED = {"expected-statuses": ["400", "404", "413", "415", "422"]}
CONFIG = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": REFUSED}})


def check(num_examples, **options):
    """Ask every operation what its schema allows, and what it does not, and hold the answers to the document."""
    with running(FakePool(make_adapter("imdb_small")), batch_wait_ms=0.0) as server:
        document = schemathesis.openapi.from_url(f"{server.address}/openapi.json", config=CONFIG)
        statuses = Counter()
        for operation in (found.ok() for found in document.get_all_operations()):
            # The other operations take no body and no parameter: there is one request, and it is allowed.
            is_post = operation.method == "post"
            for mode in list(GenerationMode)[: 2 if is_post else 1]:

                @settings(
                    max_examples=num_examples if is_post else 1,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    **options,
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def ask(case):
                    response = case.call()
                    statuses[case.method, case.path, response.status_code] += 1
                    case.validate_response(response, checks=CHECKS)

                ask()
        with urlopen(f"{server.address}/healthz") as response:
            assert response.status == 200
        return statuses


def test_every_answer_is_one_that_the_document_names():
    statuses = check(25, derandomize=True, database=None)
    for path in ("/predict", "/"):
        assert statuses["POST", path, 200] >= 3
        assert statuses["POST", path, 422] >= 3


@pytest.mark.slow
def test_every_answer_is_one_that_the_document_names_at_length():
    assert check(3000)["POST", "/predict", 200] > 100
