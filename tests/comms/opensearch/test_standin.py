"""The stand-in answers as OpenSearch does, where both are there, and refuses more."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import urllib3

from .standin import StandIn

FIELDS = {
    "k": {"type": "keyword"},
    "n": {"type": "long"},
    "x": {"type": "double"},
    "t": {"type": "text"},
    "o": {"type": "object", "enabled": False},
    "b": {"type": "boolean"},
}
DEFINITION = {
    "settings": {"number_of_shards": 1, "number_of_replicas": 0},
    "mappings": {"dynamic": "strict", "properties": FIELDS},
}


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.fixture(params=["standin", pytest.param("real", marks=pytest.mark.timeout(300))])
def url(request: pytest.FixtureRequest) -> Any:
    return (
        request.getfixturevalue("standin").url
        if request.param == "standin"
        else request.getfixturevalue("opensearch_url")
    )


class Talk:
    def __init__(self, url: str) -> None:
        self.url, self.http = url, urllib3.PoolManager(retries=False)
        self.index = f"t{secrets.token_hex(6)}"

    def __call__(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        target = f"{self.url}/{path.replace('INDEX', self.index)}"
        given = (
            {"body": body, "headers": {"content-type": "application/x-ndjson"}}
            if isinstance(body, bytes)
            else {"json": body}
        )
        answer = self.http.request(method, target, **(given if body is not None else {}), timeout=10, **options)
        return answer.status, answer.json() if answer.data else None

    def found(self, query: Any, **more: Any) -> list[str]:
        status, answer = self("POST", "INDEX/_search", {"query": query, **more})
        assert status == 200, answer
        return [hit["_id"] for hit in answer["hits"]["hits"]]


@pytest.fixture
def talk(url: str) -> Iterator[Talk]:
    talk = Talk(url)
    assert talk("PUT", "INDEX", DEFINITION)[0] == 200
    yield talk
    assert talk("DELETE", "INDEX")[0] == 200
    talk.http.clear()


def test_documents_are_created_once_and_changed_over_what_was_read(talk: Talk) -> None:
    status, made = talk("PUT", "INDEX/_create/1", {"k": "a"})
    assert (status, made["result"], made["_version"], made["_seq_no"]) == (201, "created", 1, 0)
    status, refused = talk("PUT", "INDEX/_create/1", {"k": "a"})
    assert (status, refused["error"]["type"]) == (409, "version_conflict_engine_exception")
    over = f"if_seq_no={made['_seq_no']}&if_primary_term={made['_primary_term']}"
    assert talk("PUT", f"INDEX/_doc/1?{over}", {"k": "b"})[0] == 200
    assert talk("PUT", f"INDEX/_doc/1?{over}", {"k": "c"})[0] == 409
    assert talk("PUT", f"INDEX/_doc/2?{over}", {"k": "c"})[0] == 409
    assert talk("DELETE", f"INDEX/_doc/1?{over}")[0] == 409
    status, got = talk("GET", "INDEX/_doc/1")
    assert (status, got["_source"], got["_seq_no"], got["found"]) == (200, {"k": "b"}, 1, True)
    assert talk("DELETE", "INDEX/_doc/1")[1]["result"] == "deleted"
    status, gone = talk("DELETE", "INDEX/_doc/1")
    assert (status, gone["result"]) == (404, "not_found")
    status, gone = talk("GET", "INDEX/_doc/1")
    assert (status, gone["found"]) == (404, False)


def test_updates_merge(talk: Talk) -> None:
    assert talk("POST", "INDEX/_update/1", {"doc": {"k": "a"}})[0] == 404
    assert talk("POST", "INDEX/_update/1", {"doc": {"k": "a"}, "doc_as_upsert": True})[0] == 201
    assert talk("POST", "INDEX/_update/1", {"doc": {"o": {"deep": 1}}})[1]["result"] == "updated"
    assert talk("POST", "INDEX/_update/1", {"doc": {"k": "a"}})[1]["result"] == "noop"
    assert talk("GET", "INDEX/_doc/1")[1]["_source"] == {"k": "a", "o": {"deep": 1}}


def test_a_bulk_has_an_outcome_for_each(talk: Talk) -> None:
    body = (
        b'{"create":{"_id":"1"}}\n{"k":"a"}\n'
        b'{"create":{"_id":"1"}}\n{"k":"b"}\n'
        b'{"index":{"_id":"2"}}\n{"unknown":1}\n'
        b'{"index":{"_id":"2","if_seq_no":7,"if_primary_term":1}}\n{"k":"b"}\n'
        b'{"delete":{"_id":"1"}}\n'
        b'{"delete":{"_id":"9"}}\n'
        b'{"update":{"_id":"8"}}\n{"doc":{"k":"b"}}\n'
    )
    status, answer = talk("POST", "INDEX/_bulk", body)
    assert (status, answer["errors"]) == (200, True)
    items = [next(iter(item.values())) for item in answer["items"]]
    assert [item["status"] for item in items] == [201, 409, 400, 409, 200, 404, 404]
    assert items[2]["error"]["type"] == "strict_dynamic_mapping_exception"
    assert talk("POST", "INDEX/_bulk", body.rstrip())[0] == 400


def test_reading_by_id_sees_what_a_search_does_not(talk: Talk) -> None:
    talk("PUT", "INDEX/_settings", {"index": {"refresh_interval": "-1"}})
    assert talk("PUT", "INDEX/_doc/1", {"k": "a"})[0] == 201
    assert talk("POST", "INDEX/_mget", {"ids": ["1", "2"]})[1]["docs"][0]["_source"] == {"k": "a"}
    assert [each["found"] for each in talk("POST", "INDEX/_mget", {"ids": ["1", "2"]})[1]["docs"]] == [True, False]
    assert talk.found({"match_all": {}}) == []
    assert talk("POST", "INDEX/_refresh")[0] == 200
    assert talk.found({"match_all": {}}) == ["1"]
    assert talk("PUT", "INDEX/_doc/2?refresh=true", {"k": "a"})[0] == 201
    assert talk("POST", "INDEX/_count", {"query": {"term": {"k": "a"}}})[1]["count"] == 2


@pytest.fixture
def filled(talk: Talk) -> Talk:
    rows = [
        ("1", "a", 3, "Hello big world"),
        ("2", "b", 1, "good bye"),
        ("3", "ab", 2, "hello again"),
        ("4", "c", None, ""),
    ]
    for name, k, n, t in rows:
        talk("PUT", f"INDEX/_doc/{name}", {"k": k, "n": n, "t": t, "b": name == "1", "o": {"free": name}})
    talk("POST", "INDEX/_refresh")
    return talk


QUERIES: list[tuple[Any, str]] = [
    ({"match_all": {}}, "1234"),
    ({"term": {"k": "a"}}, "1"),
    ({"terms": {"k": ["a", "c", "z"]}}, "14"),
    ({"term": {"n": 2}}, "3"),
    ({"term": {"b": True}}, "1"),
    ({"range": {"n": {"gt": 1}}}, "13"),
    ({"range": {"n": {"gte": 1, "lt": 3}}}, "23"),
    ({"prefix": {"k": "a"}}, "13"),
    ({"exists": {"field": "n"}}, "123"),
    ({"ids": {"values": ["2", "7"]}}, "2"),
    ({"wildcard": {"k": {"value": "*b"}}}, "23"),
    ({"bool": {"filter": [{"prefix": {"k": "a"}}], "must_not": [{"term": {"n": 2}}]}}, "1"),
    ({"bool": {"should": [{"term": {"k": "b"}}, {"term": {"k": "c"}}], "minimum_should_match": 1}}, "24"),
    ({"simple_query_string": {"query": "hello", "fields": ["t"]}}, "13"),
    ({"simple_query_string": {"query": "hello world", "fields": ["t"], "default_operator": "and"}}, "1"),
    ({"simple_query_string": {"query": '"big world"', "fields": ["t"]}}, "1"),
    ({"simple_query_string": {"query": "hell*", "fields": ["t"]}}, "13"),
    ({"match": {"t": "Good"}}, "2"),
]


def test_queries_find_the_same(filled: Talk) -> None:
    assert ["".join(sorted(filled.found(query))) for query, _ in QUERIES] == [expected for _, expected in QUERIES]


def test_pages_follow_one_another(filled: Talk) -> None:
    everything: Any = {"match_all": {}}
    assert filled.found(everything, sort=[{"n": "asc"}]) == ["2", "3", "1", "4"]
    assert filled.found(everything, sort=[{"n": "desc"}]) == ["1", "3", "2", "4"]
    assert filled.found(everything, sort=[{"n": "asc"}], size=2) == ["2", "3"]
    assert filled.found(everything, sort=[{"n": "asc"}], search_after=[2]) == ["1", "4"]
    assert filled.found(everything, sort=[{"k": "desc"}], search_after=["b"]) == ["3", "1"]
    _, answer = filled("POST", "INDEX/_search", {"size": 1, "query": {"term": {"k": "a"}}, "_source": ["k"]})
    assert answer["hits"]["hits"][0]["_source"] == {"k": "a"}
    assert answer["hits"]["total"] == {"value": 1, "relation": "eq"}
    _, answer = filled("POST", "INDEX/_search", {"size": 0, "aggs": {"by": {"terms": {"field": "k"}}}})
    assert sorted((each["key"], each["doc_count"]) for each in answer["aggregations"]["by"]["buckets"]) == [
        *(("a", 1), ("ab", 1), ("b", 1), ("c", 1))
    ]


def test_deleting_by_query(filled: Talk) -> None:
    status, answer = filled("POST", "INDEX/_delete_by_query?refresh=true", {"query": {"prefix": {"k": "a"}}})
    assert (status, answer["deleted"]) == (200, 2)
    assert sorted(filled.found({"match_all": {}})) == ["2", "4"]


REFUSED: list[tuple[str, str, Any, int]] = [
    ("PUT", "INDEX", DEFINITION, 400),
    ("PUT", "INDEX/_doc/1", {"unknown": 1}, 400),
    ("PUT", "INDEX/_doc/1", {"n": "no number"}, 400),
    ("PUT", "INDEX/_doc/1", {"k": "x" * 40_000}, 400),
    ("PUT", f"INDEX/_doc/{'x' * 600}", {"k": "a"}, 400),
    ("PUT", "INDEX/_doc/1?colour=red", {"k": "a"}, 400),
    ("PUT", "INDEX/_doc/1?if_seq_no=1", {"k": "a"}, 400),
    ("POST", "INDEX/_search", {"query": {"telepathy": {}}}, 400),
    ("POST", "INDEX/_search", {"guess": 1}, 400),
    ("POST", "INDEX/_search", {"sort": ["t"]}, 400),
    ("POST", "INDEX/_search", {"sort": ["nowhere"]}, 400),
    ("POST", "INDEX/_search", {"size": 10_001}, 400),
    ("POST", "INDEX/_search", {"search_after": [1]}, 400),
    ("POST", "INDEX/_mget", {}, 400),
    ("POST", "none-INDEX/_search", {}, 404),
    ("GET", "none-INDEX/_doc/1", None, 404),
    ("HEAD", "none-INDEX", None, 404),
    ("PUT", "INDEX/_create/1?refresh=perhaps", {"k": "a"}, 400),
    ("PUT", "Upper-INDEX", {}, 400),
    ("POST", "INDEX/_doc/1/nothing", {}, 400),
]


def test_what_is_refused(talk: Talk) -> None:
    talk("PUT", "INDEX/_doc/there", {"k": "a", "n": 1, "t": "b"})
    talk("POST", "INDEX/_refresh")
    got = [(method, path, talk(method, path, body)[0]) for method, path, body, _ in REFUSED]
    assert got == [(method, path, status) for method, path, _, status in REFUSED]


# of the stand-in alone


@pytest.mark.parametrize("query", [{"term": {"nowhere": 1}}, {"exists": {"field": "nowhere"}}, {"prefix": {"n": "1"}}])
def test_a_slip_in_a_query_is_refused_and_does_not_match_nothing(standin: StandIn, query: Any) -> None:
    talk = Talk(standin.url)
    talk("PUT", "INDEX", DEFINITION)
    talk("PUT", "INDEX/_doc/1?refresh=true", {"n": 1})
    assert talk("POST", "INDEX/_search", {"query": query})[0] == 400
    talk.http.clear()


def test_the_switches(standin: StandIn) -> None:
    talk = Talk(standin.url)
    talk("PUT", "INDEX", DEFINITION)
    standin.fail(429, "_doc", times=2)
    assert [talk("PUT", "INDEX/_doc/1", {"k": "a"})[0] for _ in range(3)] == [429, 429, 201]
    standin.drop("_create")
    with pytest.raises(urllib3.exceptions.ProtocolError):
        talk("PUT", "INDEX/_create/2", {"k": "a"})
    assert talk("GET", "INDEX/_doc/2")[0] == 200
    standin.slow(5, "_doc", times=1)
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        talk.http.request("GET", f"{talk.url}/{talk.index}/_doc/2", timeout=0.1)
    standin.reject_items(1)
    lines = b'{"index":{"_id":"3"}}\n{"k":"a"}\n' * 2
    assert [each["index"]["status"] for each in talk("POST", "INDEX/_bulk", lines)[1]["items"]] == [429, 201]
    standin.stop()
    with pytest.raises(urllib3.exceptions.HTTPError):
        talk("GET", "INDEX/_doc/2")
    standin.start()
    assert talk("GET", "INDEX/_doc/2")[1]["_primary_term"] == 1
    assert talk("PUT", "INDEX/_doc/2", {"k": "b"})[1]["_primary_term"] == 2
    talk.http.clear()


def test_credentials() -> None:
    with StandIn(user="osqbox", password="secret") as standin:
        talk = Talk(standin.url)
        assert talk("GET", "")[0] == 401
        headers = urllib3.make_headers(basic_auth="osqbox:secret")
        assert talk("GET", "", headers=headers)[0] == 200
        talk.http.clear()
