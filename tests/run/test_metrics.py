"""metrics.csv: plain numbers, late columns, interrupted writes, resuming."""

from __future__ import annotations

import csv
import gc
import math
import weakref

import pytest
import torch

from pwm_torchrl.algorithm.base import MetricRow
from pwm_torchrl.run.metrics import CsvMetrics, checked_metrics, read_metrics


class TestMetricRow:
    def test_set_keeps_the_last_and_mean_averages(self):
        row = MetricRow()
        row.set({"epoch": 1})
        row.set({"epoch": 2})
        row.mean({"model": torch.tensor(1.0), "actor": 4}, prefix="loss/")
        row.mean({"model": torch.tensor([[2.0]])}, prefix="loss/")
        assert row.numbers() == {"epoch": 2, "loss/model": 1.5, "loss/actor": 4}
        assert type(row.numbers()["epoch"]) is int

    @pytest.mark.parametrize("method", ["set", "mean"])
    def test_refuses_what_owns_a_graph(self, method):
        loss = torch.ones(3, requires_grad=True).sum()
        with pytest.raises(ValueError, match=r"'loss/model' requires grad"):
            getattr(MetricRow(), method)({"model": loss}, prefix="loss/")

    def test_refuses_what_is_not_one_number(self):
        with pytest.raises(ValueError, match=r"shape \(2,\)"):
            MetricRow().set({"x": torch.zeros(2)})
        with pytest.raises(TypeError, match="'x' is a str"):
            MetricRow().set({"x": "1"})

    def test_keeps_neither_the_tensor_nor_its_storage(self):
        row = MetricRow()
        value = torch.ones(1000)
        row.mean({"x": value[0]})
        storage = weakref.ref(value)
        value.zero_()
        del value
        gc.collect()
        assert storage() is None
        assert row.numbers() == {"x": 1.0}

    def test_averages_in_the_order_of_the_calls(self):
        row = MetricRow()
        for value in range(5):
            row.mean({"x": float(value)})
        assert row.numbers() == {"x": 2.0}


class TestCsvMetrics:
    def test_every_row_is_on_disk_when_written(self, tmp_path):
        file = tmp_path / "metrics.csv"
        metrics = CsvMetrics(file)
        for epoch in range(3):
            metrics.write({"epoch": epoch, "loss/model": 0.1 * epoch})
            assert read_metrics(file)["epoch"] == list(range(epoch + 1))
        metrics.close()

    def test_late_columns_extend_the_header(self, tmp_path):
        file = tmp_path / "metrics.csv"
        with CsvMetrics(file) as metrics:
            metrics.write({"epoch": 1, "a": 1.0})
            metrics.write({"epoch": 2, "b": 2.0})
            metrics.write({"epoch": 3, "a": 3.0})
        with file.open(newline="") as text:
            assert list(csv.reader(text)) == [
                ["epoch", "a", "b"],
                ["1", "1.0", ""],
                ["2", "", "2.0"],
                ["3", "3.0", ""],
            ]
        read = read_metrics(file)
        assert math.isnan(read["b"][0])
        assert read["b"][1] == 2.0
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]

    def test_numbers_survive_exactly(self, tmp_path):
        file = tmp_path / "metrics.csv"
        values = [0.1 + 0.2, 1e-300, -math.inf, 123456789012345678]
        with CsvMetrics(file) as metrics:
            for value in values:
                metrics.write({"x": value})
        assert read_metrics(file)["x"] == [float(v) for v in values]

    def test_resume_drops_later_rows_and_goes_on(self, tmp_path):
        file = tmp_path / "metrics.csv"
        with CsvMetrics(file) as metrics:
            for epoch in range(1, 6):
                metrics.write({"epoch": epoch, "x": epoch})
        with CsvMetrics(file) as metrics:
            metrics.truncate(3)
            metrics.write({"epoch": 4, "x": 40, "late": 1})
        read = read_metrics(file)
        assert read["epoch"] == [1, 2, 3, 4]
        assert read["x"] == [1, 2, 3, 40]

    def test_a_torn_last_line_is_dropped(self, tmp_path):
        file = tmp_path / "metrics.csv"
        file.write_text("epoch,x\n1,10\n2,2")
        with CsvMetrics(file) as metrics:
            metrics.write({"epoch": 2, "x": 20})
        assert read_metrics(file) == {"epoch": [1, 2], "x": [10, 20]}

    @pytest.mark.parametrize("content", ["", "epo"])
    def test_a_file_without_a_header_starts_over(self, tmp_path, content):
        file = tmp_path / "metrics.csv"
        file.write_text(content)
        with CsvMetrics(file) as metrics:
            metrics.truncate(0)
            metrics.write({"epoch": 1})
        assert read_metrics(file) == {"epoch": [1]}

    @pytest.mark.parametrize(
        ("content", "told", "epochs"),
        [
            ("epoch,x\n1,10\n2,20\n", None, [1, 2]),
            ("epoch,x\n1,10\n2,2", None, [1]),
            ("epoch,x,y\n1,,nan\n2,inf,-1e-3\n", None, [1, 2]),
            ("epoch,x\n1,1O\n2,20\n", "1 cell without a number", [1, 2]),
            ("epoch,x\n1,10\n2,20\n1,10\n2,20\n", "2 rows left out", [1, 2]),
            ("epoch,x,y\n1,10,5\n2l20,6\n3,30,7\n", "1 row left out", [1, 3]),
            ("epoch,x\n1,10\n4,40\n", "no rows for 2 epochs", [1, 4]),
            ("epoch,x\n1,10\n1.5,40\n", "1 row left out", [1]),
            ("", "no header", None),
            ("\n\n", "no header", None),
            ("epocH,x\n1,10\n", "no column epoch", None),
            ("epoch,\ufffd\n1,10\n", "1 column without a name", [1]),
        ],
    )
    def test_damage_is_told(self, tmp_path, content, told, epochs):
        """Of a row with too few or too many cells, values would be read into other columns."""
        file = tmp_path / "metrics.csv"
        file.write_text(content)
        assert read_metrics(file).get("epoch") == epochs
        _, damage = checked_metrics(file)
        assert (damage is None) == (told is None)
        assert told is None or (told in damage and damage.startswith("metrics.csv "))

    def test_damaged_rows_are_told_before_they_are_dropped(self, tmp_path, capsys):
        file = tmp_path / "metrics.csv"
        file.write_text("epoch,x\n1,10\n2,\n3,30,4\n")
        CsvMetrics(file)
        assert f"{file}: metrics.csv is damaged: 1 row left out" in capsys.readouterr().err
        assert file.read_text().splitlines() == ["epoch,x", "1,10", "2,"]

    @pytest.mark.parametrize("content", ["", "epoch,x\n1,10\n", "epoch,x\n1,10\n2,2"])
    def test_rows_that_are_missing_at_a_resume_are_told(self, tmp_path, content, capsys):
        file = tmp_path / "metrics.csv"
        file.write_text(content)
        with CsvMetrics(file) as metrics:
            metrics.truncate(1 if content else 0)
            assert not capsys.readouterr().err
            metrics.truncate(2)
        assert f"{file} is damaged: its rows end at epoch {len(content) > 0:d}" in capsys.readouterr().err

    def test_truncating_nothing_is_fine(self, tmp_path):
        metrics = CsvMetrics(tmp_path / "metrics.csv")
        metrics.truncate(5)
        assert not metrics.path.exists()

    def test_refuses_tensors(self, tmp_path):
        with CsvMetrics(tmp_path / "m.csv") as metrics, pytest.raises(ValueError, match="'x' is a Tensor"):
            metrics.write({"x": torch.tensor(1.0)})
