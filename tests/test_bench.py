"The benchmark: every part of it, killed and continued, and numbers that are recounted from the flags."
import json

import numpy as np
import pytest

from agft import bench as module
from agft import diagnostics
from agft.bench_report import bench_page
from agft.cli import main
from agft.config import as_dict, load_preset, override
from agft.evaluation import Flags, read_flags
from agft.results import MEAN, Results
from agft.search import _rates, search_all
from agft.threats import threats_of

TABLES = {'trials', 'paired', 'ablation', 'weights', 'hypervolume', 'calibration', 'reliability', 'margins',
          'tsne', 'cost'}
PROTOCOL = dict(seeds=2, images=8, ablation=dict(gamma=[.4, 1.], scale=[1.8], trials=1, images=6),
                weights=dict(shares=[.5], images=6), calibration=dict(images=6, tsne='texture'))
THREATS = dict(attacks=['fgsm', 'mifgsm'], eps=['4/255'], images=6)


@pytest.fixture
def cut(small_preset):
    "A recipe whose protocol takes seconds."
    recipe = load_preset(small_preset(tasks=1))
    parts = dict(sweep=THREATS, strong=THREATS, unseen=THREATS)
    protocol = {**as_dict(recipe.protocol), **PROTOCOL, **parts}
    return override(recipe, bench=protocol)


@pytest.fixture
def one_process(monkeypatch):
    "Jobs run in this process, where they can be killed."
    monkeypatch.setattr('torch.get_num_threads', lambda: 1)


def without_times(path):
    results = json.loads(path.read_text())
    results['tables'].pop('cost')
    for key in ('seconds', 'training_seconds'):
        results['about'].pop(key)
    return results


def check_what_a_reader_finds(results):
    main = results.select(section='main')
    assert set(results.tables) == TABLES and main.methods() == ['CLIP', 'TeCoA', 'AGFT']
    assert set(results.tables['paired'].other) == {'CLIP', 'TeCoA'}
    assert set(results.select(section='ablation').methods()) == {'γ 0.4, 1/τ 85', 'γ 1, 1/τ 85'}
    calibration = results.tables['calibration']
    assert calibration.ece.between(0, 1).all() and set(calibration.task) == {'source', MEAN}
    assert set(calibration.scale) == {'training', 'own', 'fitted'}
    assert set(calibration.kind) == {'clean', 'adversarial'}
    own = calibration.query("method == 'CLIP' and kind == 'clean' and scale == 'own'")
    margin = results.tables['margins'].query("method == 'CLIP' and kind == 'clean'")
    assert (own.overlap == 1).all() and abs(margin.ratio.item() - 1) < 1e-5
    cost = results.tables['cost'].set_index('method')
    assert cost.ratio['TeCoA'] == 1 and results.tables['hypervolume'].hypervolume.between(0, 1).all()
    assert len(results.tables['weights'].query("method == 'AGFT'")) == 3
    assert 'worst case 4/255' in results.select(section='strong').threats()
    page = bench_page(results)
    assert page.count('<table') == 11 and page.count('<svg') == 3 and 'http' not in page


def check_numbers_are_recounted(results, out):
    folder = next(path.parent for path in (out/'main'/'AGFT-0').rglob('texture.npz')).name
    flags = [read_flags(out/'main'/f'AGFT-{seed}'/folder/'texture.npz') for seed in (0, 1)]
    row = results.select(section='main', method='AGFT', task='texture').final().iloc[0]
    assert row.robust == pytest.approx(np.mean([f.robust.mean() for f in flags])) and row.seeds == 2


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_numbers(cut, tmp_path, monkeypatch, one_process):
    results = module.bench(cut, tmp_path/'whole', 'cpu', search=False)
    check_what_a_reader_finds(results)
    check_numbers_are_recounted(results, tmp_path/'whole')
    places = [(module, 'finetune'), (module, 'evaluate_threats'), (diagnostics, '_calibration'),
              (module, 'cost_rows')]
    for place, name in places:
        real, calls = getattr(place, name), []
        def dies(*args, real=real, calls=calls, name=name, **more):
            calls.append(1)
            if len(calls) == 2 or name == 'cost_rows':
                raise KeyboardInterrupt
            return real(*args, **more)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, dies)
            module.bench(cut, tmp_path/'parts', 'cpu', search=False)
    runs = {f: f.stat().st_mtime_ns for f in (tmp_path/'parts'/'runs').rglob('model.safetensors')}
    module.bench(cut, tmp_path/'parts', 'cpu', search=False)
    assert all(f.stat().st_mtime_ns == time for f, time in runs.items()), 'a finished run was trained again'
    assert without_times(tmp_path/'parts'/'results.json') == without_times(tmp_path/'whole'/'results.json')


def test_the_command_writes_into_its_directory_and_nowhere_else(cut, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'cut.json').write_text(json.dumps(as_dict(cut)))
    before = {f.name for f in tmp_path.iterdir()}
    assert main(['bench', '--preset', 'cut.json', '--quick', '--out', 'b', '--seed', '3']) == 0
    assert {f.name for f in tmp_path.iterdir()} == before | {'b'} and (tmp_path/'b'/'report.html').exists()
    results = Results.load(tmp_path/'b'/'results.json')
    assert set(results.select(section='main', method='AGFT').accuracy.seed.dropna()) == {3, 4}


@pytest.mark.slow
def test_the_recorded_command_typed_again_gives_the_same_numbers(cut, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'cut.json').write_text(json.dumps(as_dict(cut)))
    assert main(['bench', '--preset', 'cut.json', '--quick', '--out', 'b']) == 0
    words = Results.load('b/results.json').about['command'].split()
    assert main([*words[1:], '--out', 'again']) == 0
    first, again = (without_times(tmp_path/name/'results.json') for name in ('b', 'again'))
    assert first == again


def test_from_runs_that_diverge_the_search_goes_down(cut, tmp_path, one_process):
    high = override(cut, **{'methods.TeCoA.lr': 1e6, 'search.low': 1e5, 'search.high': 1e7})
    trials = search_all(high, ['TeCoA'], tmp_path, 'cpu')
    assert [t.lr for t in trials if t.chosen] == [2e5] and [t.lr for t in trials] == [1e6, 5e5, 2e5]
    assert all(t.clean == 0 and 'try a lower method.lr' in t.diverged for t in trials)


@pytest.mark.parametrize('name', ['tiny', 'photo'])
def test_every_preset_has_a_whole_protocol(name):
    recipe = load_preset(name)
    assert set(recipe.demo) <= set(recipe.methods) and recipe.protocol.version >= 1
    for method in recipe.methods.values():
        assert method.lr in _rates(recipe.search.low, recipe.search.high)
    for part in (recipe.protocol.sweep, recipe.protocol.strong, recipe.protocol.unseen):
        assert threats_of(part)


def test_quick_keeps_every_part():
    recipe = load_preset('tiny')
    short = module.quick(recipe)
    assert recipe == load_preset('tiny') and short.methods == recipe.methods
    assert as_dict(short.protocol).keys() == as_dict(recipe.protocol).keys()


def test_a_preset_without_a_protocol_is_refused(tmp_path, capsys):
    assert main(['bench', '--preset', 'vit_b32_small', '--out', str(tmp_path/'b')]) == 2
    assert 'no bench protocol' in capsys.readouterr().err


def test_tasks_that_the_original_cannot_do_count_in_no_mean():
    def task(clean, chance):
        known, unused = np.arange(100) < 100*clean, np.zeros(100)
        return Flags(known, known, unused, unused, unused, np.array(chance))
    original = dict(source=task(.1, .1), ten=task(.29, .1), ten_more=task(.31, .1), three=task(.97, 1/3),
                    two=task(.74, .5), two_more=task(.76, .5))
    assert module.too_hard(original, 'source') == ['ten', 'two']
