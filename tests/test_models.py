"""What the shipped models promise."""
import subprocess
from pathlib import Path
import pytest, torch
from agft.attack import pixels
from agft.clip import load_clip
from agft.core import asset, load_preset, read_json
from agft.data import load_task
from agft.evaluate import evaluate
from agft.threat import threat

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('name, limit', [('agft-tiny', 5e6), ('agft-photo', 7e6)])
def test_weights_are_shipped_small(name, limit):
    path = asset(f'{name}.safetensors')
    assert path.stat().st_size <= limit
    if (ROOT/'.git').exists():
        assert f'agft/assets/{path.name}' in subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_tiny_is_a_zero_shot_model_that_attacks_break():
    preset, model, clean, robust = load_preset('tiny'), load_clip('agft-tiny'), {}, {}
    eps = pixels(preset['eval']['eps'][0])
    for name in (preset['source'], *preset['zero_shot']):
        task = load_task(name, 480)
        head = model.head(task.classes, task.templates)
        with torch.no_grad(): clean[name] = torch.cat([model.logits(x/255, head).argmax(1) for x in task.images.split(160)]).eq(task.labels).double().mean()
    for name in (preset['source'], *preset['zero_shot']): robust[name] = evaluate(model, load_task(name, 60), threat('pgd20', eps))['robust'].mean()
    drawn = [n for n in preset['zero_shot'] if n != 'handwritten']
    assert clean['source'] >= .85 and sum(clean[n] for n in drawn)/len(drawn) >= .85, clean
    assert robust['source'] < .15 and sum(robust[n] for n in preset['zero_shot'])/len(preset['zero_shot']) < .15, robust


@pytest.mark.parametrize('name', ['tiny', 'photo'])
def test_learning_rates_are_those_that_the_benchmark_chose(name):
    preset = load_preset(name)
    found = read_json(ROOT/preset['lr_from']['results'])
    assert {m: s['lr'] for m, s in preset['methods'].items()} == {m: v['best'] for m, v in found['lr'].items()}
    assert found['about']['command'] == preset['lr_from']['command']
