"""Progress bars."""

from embtrim.system.progress import StageBar


def test_a_bar_appears_after_two_seconds_only(monkeypatch, capsys):
    with StageBar(True) as bar:
        bar.update("writing ids", 0.5)
        assert bar._progress is None
        bar.started -= 3
        bar.update("writing ids", 0.6)
        assert bar._progress is not None
    assert capsys.readouterr().out == ""
    with StageBar(False) as bar:
        bar.started -= 3
        bar.update("writing ids", 0.6)
        assert bar._progress is None
