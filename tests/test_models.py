"""What the shipped models promise."""
import subprocess
from pathlib import Path

import pytest
import torch

from agft.config import load_preset
from agft.core import asset
from agft.data import load_task
from agft.evaluation import evaluate_task
from agft.results import MEAN, Results, percent
from agft.threats import threat
from agft.weights import load_model

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('name, limit', [('agft-tiny', 5e6), ('agft-photo', 7e6)])
def test_weights_are_shipped_small(name, limit):
    path = asset(f'{name}.safetensors')
    assert path.stat().st_size <= limit
    if not (ROOT/'.git').exists():
        return
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'agft/assets/{path.name}' in tracked


def clean_accuracy(model, name):
    task = load_task(name, 480)
    head = model.head(task.classes, task.templates)
    with torch.no_grad():
        predicted = torch.cat([model.logits(x/255, head).argmax(1) for x in task.images.split(160)])
    return (predicted == task.labels).double().mean().item()


def test_tiny_is_a_zero_shot_model_that_attacks_break():
    recipe, model = load_preset('tiny'), load_model('agft-tiny')
    pgd20 = threat('pgd20', recipe.eval.eps[0])
    tasks = (recipe.data.source, *recipe.data.zero_shot)
    clean = {name: clean_accuracy(model, name) for name in tasks}
    robust = {name: evaluate_task(model, load_task(name, 60), pgd20).robust.mean() for name in tasks}
    drawn = [clean[name] for name in recipe.data.zero_shot if name != 'handwritten']
    assert clean[recipe.data.source] >= .85 and sum(drawn)/len(drawn) >= .85, clean
    zero_shot = [robust[name] for name in recipe.data.zero_shot]
    assert robust[recipe.data.source] < .15 and sum(zero_shot)/len(zero_shot) < .15, robust


@pytest.mark.parametrize('name', ['tiny', 'photo'])
def test_settings_are_those_that_the_benchmark_chose(name):
    recipe = load_preset(name)
    source = recipe.lr_from
    assert source is not None
    results = Results.load(ROOT/source.results)
    chosen = results.tables['trials'].query('chosen').set_index('method')
    assert {method: settings.lr for method, settings in recipe.methods.items()} == chosen.lr.to_dict()
    for key in chosen.columns.intersection(['gamma', 'logit_scale']):
        for method, value in chosen[key].dropna().items():
            assert getattr(recipe.methods[method], key) == value
    assert results.about['command'] == source.command


def test_the_demonstration_quotes_the_stored_results():
    recipe = load_preset('demo')
    source = recipe.lr_from
    assert source is not None and source.command in recipe.demo_note
    means = Results.load(ROOT/source.results).select(section='main', task=MEAN).final().set_index('method')
    for method in recipe.demo:
        row = means.loc[method]
        assert f'{method} {percent(row.clean)} / {percent(row.robust)}' in recipe.demo_note
    for file, run in (('labels_lower_rate', 'TeCoA, 40 % wrong'), ('labels', 'AGFT, clean labels')):
        found = Results.load(ROOT/f'results/{file}_tiny.json').select(task=MEAN).final().set_index('method')
        row = found.loc[run]
        assert f'{percent(row.clean)} / {percent(row.robust)}' in recipe.demo_note
