from __future__ import annotations

import pickle

from lightning_freeze.audit.findings import Finding, Report, alike, described, merged


def finding(name: str, cause: str = "Why.", kind: str = "no_gradient") -> Finding:
    return Finding(kind, name, cause, "Fix.", 3)  # type: ignore[arg-type]


def test_findings_that_are_alike_are_said_once() -> None:
    findings = [finding("a"), finding("b", "Other."), finding("c")]
    assert [[one.name for one in group] for group in alike(findings)] == [["a", "c"], ["b"]]
    report = Report(findings, checks=2, parameters=1)
    assert str(report) == (
        "audit: 3 findings in 2 checks over 1 parameter\n"
        "a, c: trainable, but it gets no gradient\n  cause: Why.\n  fix:   Fix.\n"
        "b: trainable, but it gets no gradient\n  cause: Other.\n  fix:   Fix."
    )


def test_of_many_names_the_first_are_shown() -> None:
    text = described([finding(f"layer.{number}") for number in range(25)])
    assert "layer.19 and 5 more: " in text
    assert "layer.20" not in text


def test_a_report_is_a_list_that_pickles() -> None:
    report = Report([finding("a")], checks=5, parameters=7)
    twin = pickle.loads(pickle.dumps(report))
    assert twin == report == [finding("a")]
    assert twin.summary == report.summary == "audit: 1 finding in 5 checks over 7 parameters"
    assert not Report()


def test_a_report_of_a_process_that_trained_nothing_does_not_read_like_a_clean_one() -> None:
    assert str(Report(parameters=7)) == "audit: nothing was audited in this process"
    assert str(Report([finding("a")])).startswith("audit: 1 finding in 0 checks")


def test_what_some_ranks_found_says_which() -> None:
    both, one = finding("a"), finding("b")
    result = merged([[both], [both, one], [both, one]])
    assert result[0] == both
    assert result[1].cause == "Why. (On rank 1, 2 only.)"
    assert merged([[one]]) == [one]
