"""Names of version 0.1: each says its new name, and does what that does."""
import inspect
import warnings

import pytest
import torch

from spml_kit import renamed
from spml_kit.infer.pseudo import nearest_segment_scores, random_walk_scores, scores_to_labels
from spml_kit.infer.views import embed_view
from spml_kit.learn.callbacks import ScheduleCB, TermMetric
from spml_kit.learn.distributed import world_size
from spml_kit.learn.losses import MultiTermLoss
from spml_kit.runs.captions import captioned_table, tables_by_setting
from spml_kit.runs.tables import table_with_runs

NEW = dict(see=embed_view, settle=scores_to_labels, walked_scores=random_walk_scores, spread_scores=nearest_segment_scores, beside=table_with_runs, compare=captioned_table,
           side_by_side=tables_by_setting, processes=world_size, PartMetric=TermMetric, PolyCB=ScheduleCB)


def test_every_old_name_is_here():
    assert {*renamed.__all__} == {*NEW, "PartsLoss"}


@pytest.mark.parametrize("old", NEW)
def test_an_old_name_takes_the_same_and_says_the_new_one(old):
    call, new = getattr(renamed, old), NEW[old]
    assert call.__name__ == old and inspect.signature(call) == inspect.signature(new)
    asked = [p for p in inspect.signature(new).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.warns(UserWarning, match=f"`{old}` is called `{new.__name__}` since version 0.2; the old name is removed in 0.3"):
        if asked: # what lacks its arguments is refused by the new one, and not before the warning
            with pytest.raises(TypeError, match=asked[0].name): call()
        else: call()


def test_an_old_name_gives_what_the_new_one_gives():
    loss = MultiTermLoss()
    with pytest.warns(UserWarning): metric = renamed.PartMetric(loss, part="head")
    assert type(metric) is TermMetric and metric.name == "head" and metric.loss_func is loss
    with pytest.warns(UserWarning): assert renamed.processes() == world_size() == 1


def test_a_loss_of_old_records_its_parts():
    with pytest.warns(UserWarning, match="Own: `PartsLoss` is called `MultiTermLoss`"):
        class Own(renamed.PartsLoss): names = ("a",)
    with warnings.catch_warnings():
        warnings.simplefilter("error") # once, where it is written
        loss = Own()
        for v in (1., 4.): loss.keep({"a": torch.tensor(v)})
    assert isinstance(loss, MultiTermLoss) and loss.means() == {"a": 2.5} and loss.means() == {}
