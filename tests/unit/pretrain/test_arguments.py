"""Arguments out of range end a command with status 2, and a message that names them and the rule."""

import pytest

from pretrain.__main__ import build_parser

GENERATE = ("generate", "checkpoint", "--prompt", "x")
EVAL = ("eval", "checkpoint", "--data", "data")
PLAN = ("plan", "config.toml")


@pytest.mark.parametrize(
    ("command", "name", "value", "rule"),
    [
        (GENERATE, "--top-p", "0", "0 must be a number above 0 and up to 1"),
        (GENERATE, "--top-p", "1.5", "1.5 must be a number above 0 and up to 1"),
        (GENERATE, "--top-p", "nan", "nan must be a number above 0 and up to 1"),
        (GENERATE, "--temperature", "-1", "-1 must be a finite number, not below 0"),
        (GENERATE, "--temperature", "inf", "inf must be a finite number, not below 0"),
        (GENERATE, "--temperature", "hot", "'hot' must be a finite number, not below 0"),
        (GENERATE, "--max-new-tokens", "0", "0 must be a whole number, at least 1"),
        (GENERATE, "--seed", "-1", "-1 must be a whole number, at least 0"),
        (EVAL, "--micro-batch-size", "0", "0 must be a whole number, at least 1"),
        (EVAL, "--samples", "0", "0 must be a whole number, at least 1"),
        (EVAL, "--samples", "1.5", "'1.5' must be a whole number, at least 1"),
        (EVAL, "--seq-len", "0", "0 must be a whole number, at least 1"),
        (PLAN, "--world-size", "0", "0 must be a whole number, at least 1"),
        (PLAN, "--device-memory", "0", "0 must be a number above 0"),
        (PLAN, "--device-memory", "nan", "nan must be a number above 0"),
    ],
)
def test_an_argument_out_of_range_is_told(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], name: str, value: str, rule: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([*command, f"{name}={value}"])
    assert caught.value.code == 2
    assert f"argument {name}: {rule}" in capsys.readouterr().err


def test_arguments_at_their_limits_are_taken() -> None:
    arguments = build_parser().parse_args([*GENERATE, "--top-p=1", "--temperature=0", "--seed=0", "--max-new-tokens=1"])
    assert (arguments.top_p, arguments.temperature, arguments.seed, arguments.max_new_tokens) == (1.0, 0.0, 0, 1)
