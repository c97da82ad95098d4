"Presets and options: every mistake is one line that names the key."
import json

import pytest

from agft.adapters import ADAPTERS
from agft.cli import main
from agft.config import (
    ADAPTER_NAMES,
    ATTACK_NAMES,
    METHOD_NAMES,
    FinetuneConfig,
    Recipe,
    as_dict,
    build,
    load_preset,
    override,
    presets,
)
from agft.methods import METHODS
from agft.threats import THREATS

MISTAKES = [  # preset, the path that the line must name, and what it must say
    ({'train': {'stpes': 5}}, 'train.stpes', 'steps'),
    ({'train': {'warmpu': .1}}, 'train.warmpu', 'warmup'),
    ({'methods': {'AGFT': {'gama': .4}}}, 'methods.AGFT.gama', 'gamma'),
    ({'methods': {'AGFT': {'gamma': 0}}}, 'methods.AGFT.gamma', 'greater than 0'),
    ({'methods': {'AGFT': {'gamma': 1.5}}}, 'methods.AGFT.gamma', 'less than or equal to 1'),
    ({'methods': {'AGFT': {'lr': -1}}}, 'methods.AGFT.lr', 'greater than 0'),
    ({'methods': {'AGFT': {'lr': '0.1'}}}, 'methods.AGFT.lr', 'number'),
    ({'methods': {'PMG-AFT': {'reduction': 'max'}}}, 'methods.PMG-AFT.reduction', "'sum' or 'mean'"),
    ({'methods': {'AGFT': 3}}, 'methods.AGFT', 'group of settings'),
    ({'methods': []}, 'methods', 'object'),
    ({'train': {'steps': 0}}, 'train.steps', 'greater than or equal to 1'),
    ({'train': {'steps': 1.5}}, 'train.steps', 'integer'),
    ({'train': {'steps': True}}, 'train.steps', 'integer'),
    ({'train': {'batch_size': -2}}, 'train.batch_size', 'greater than or equal to 1'),
    ({'train': {'warmup': 1}}, 'train.warmup', 'less than 1'),
    ({'train': {'optimizer': 'adam'}}, 'train.optimizer', "'sgd' or 'adamw'"),
    ({'train': {'momentum': 1.2}}, 'train.momentum', 'less than 1'),
    ({'train': {'betas': [.9]}}, 'train.betas', 'missing'),
    ({'train': {'weight_decay': -.1}}, 'train.weight_decay', 'greater than or equal to 0'),
    ({'train': {'grad_clip': 0}}, 'train.grad_clip', 'greater than 0'),
    ({'train': {'precision': 'fp8'}}, 'train.precision', "'fp32', 'tf32', 'bf16' or 'fp16'"),
    ({'train': []}, 'train', 'group of settings'),
    ({'attack': {'eps': '4/0'}}, 'attack.eps', '4/255'),
    ({'attack': {'eps': -.1}}, 'attack.eps', 'greater than or equal to 0'),
    ({'attack': {'eps': 4}}, 'attack', 'write 4/255'),
    ({'attack': {'norm': 'L1'}}, 'attack.norm', "'Linf' or 'L2'"),
    ({'attack': {'steps': 'two'}}, 'attack.steps', 'integer'),
    ({'attack': {'pgd_step': '1/255'}}, 'attack.pgd_step', 'alpha'),
    ({'eval': {'eps': []}}, 'eval.eps', 'at least 1'),
    ({'eval': {'attacks': 'pgd20'}}, 'eval.attacks', 'array'),
    ({'eval': {'images': 0}}, 'eval.images', 'greater than or equal to 1'),
    ({'data': {'zero_shot': 'texture'}}, 'data.zero_shot', 'array'),
    ({'data': {'source': None}}, 'data.source', 'string'),
    ({'model': 'agft-tiny'}, 'model', 'group of settings'),
    ({'bench': {'seeds': 0}}, 'bench.seeds', 'greater than or equal to 1'),
    ({'bench': {'sweep': {'threats': ['pgd20']}}}, 'bench.sweep.threats', 'attacks'),
    ({'search': {'trial': 3}}, 'search.trial', 'trials'),
    ({'pretrain': {'text': {'lr': 0}}}, 'pretrain.text.lr', 'greater than 0'),
    ({'lr_from': {'file': 'x'}}, 'lr_from.file', 'results'),
    ({'tune': {}}, 'tune', 'search'),
    ({'base': 3}, 'base', 'name of a preset'),
    ({'base': 'huge'}, 'huge', 'tiny')]


def number(mistake): return f'{MISTAKES.index(mistake)}-{mistake[1]}'


@pytest.mark.parametrize('mistake', MISTAKES, ids=number)
def test_a_preset_with_a_mistake_is_one_line_that_names_the_key(mistake, tmp_path, capsys):
    preset, path, allowed = mistake
    file = tmp_path/'mine.json'
    file.write_text(json.dumps({'base': 'tiny', **preset}))
    assert main(['train', '--preset', str(file), '--out', str(tmp_path/'out')]) == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and path in line and allowed in line and 'Traceback' not in line, line
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('text', ['', '[]', '{', 'null', '{"base": "mine.json"}'])
def test_a_file_that_is_no_preset_is_one_line(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine.json').write_text(text)
    assert main(['train', '--preset', 'mine.json']) == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and 'mine.json' in line, line


def test_lists_of_names_are_those_of_the_registries():
    assert set(METHOD_NAMES) == set(METHODS)
    assert set(ADAPTER_NAMES) == set(ADAPTERS)
    assert set(ATTACK_NAMES) == set(THREATS)


@pytest.mark.parametrize('name', presets())
def test_a_preset_is_what_its_json_says(name):
    recipe = load_preset(name)
    assert build(Recipe, as_dict(recipe)) == recipe
    for method in recipe.methods:
        assert build(FinetuneConfig, as_dict(recipe.finetune(method))) == recipe.finetune(method)


def test_changes_by_path_are_checked():
    config = load_preset('tiny').finetune('AGFT')
    assert override(config, **{'attack.eps': '2/255'}).attack.eps == 2/255
    with pytest.raises(ValueError, match='train.stpes'):
        override(config, **{'train.stpes': 5})
