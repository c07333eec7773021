"""What a user reads who mistyped an option."""

import pytest

from rect_lightning import cli
from rect_lightning.parser import reason


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--trainer.callbacks.init_args.keep=40", "RECT's keep is a share above 0 and up to 1"),
        ("--model.stregth=2", "Option 'stregth' is not accepted"),
        ("--model.search.steps=many", "Expected a <class 'int'>. Got value: many"),
        ("--trainer.max_steps", "expected one argument"),
        ("--data.limt 2", "unrecognized arguments: --data.limt 2; did you mean --data.limit?"),
    ],
)
def test_a_mistyped_option_is_told_in_a_few_lines(option, told, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rect_lightning", "fit", "--config", "memit_smollm2.yaml", *option.split()])
    with pytest.raises(SystemExit) as end:
        cli.run()
    error = capsys.readouterr().err + str(end.value)
    assert told in error
    assert "usage" not in error
    assert "Traceback" not in error
    assert "NoneType" not in error


def test_a_message_of_another_kind_stays_whole():
    assert reason("No such thing.") == "No such thing."
    assert reason("Subtypes: all that there is") == "Subtypes: all that there is"
    assert (
        reason("Key:\n  - Not a valid subclass of X\n    - one\n    - two\n  - 3 is no int") == "Key:\n  - 3 is no int"
    )
    assert reason("A:\n  - no int\n  - no int\nB:\n  - no int") == "A:\n  - no int\nB:\n  - no int"


def test_a_wrong_command_is_told_all_there_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rect_lightning", "exprt"])
    with pytest.raises(SystemExit):
        cli.run()
    error = capsys.readouterr().err
    for command in ("fit", "predict", "moments", "export", "apply", "revert"):
        assert command in error
