"The benchmark: every part of it, killed and continued, and numbers that are recounted from the flags."
import json
import numpy as np, pytest
from agft import bench as module
from agft.cli import main
from agft.core import load_preset
from agft.evaluate import MEAN, read_flags

SECTIONS = {'protocol', 'lr', 'main', 'paired', 'sweep', 'strong', 'unseen', 'ablation', 'weights', 'calibration', 'tsne', 'cost', 'about'}


@pytest.fixture
def cut(small_preset, monkeypatch):
    "A protocol of seconds."
    def load(name):
        p = small_preset(name)
        p['zero_shot'] = p['zero_shot'][:1]
        p['tune']['images'] = 8
        b = p['bench']
        b.update(seeds=2, images=8)
        for part in ('sweep', 'strong', 'unseen', 'ablation', 'weights', 'calibration'): b[part]['images'] = 6
        for part in ('sweep', 'strong', 'unseen'): b[part].update(threats=['fgsm', 'mifgsm'], eps=['4/255'])
        b['ablation'].update(gamma=[.4, 1.], scale=[1.8])
        b['weights']['shares'] = [.5]
        b['calibration']['tsne'] = p['zero_shot'][0]
        return p
    monkeypatch.setattr(module, 'load_preset', load)
    return load


def without_times(found):
    found = json.loads(json.dumps(found))
    found.pop('cost'), found['about'].pop('seconds'), found['about'].pop('training_seconds')
    return found


def test_killed_anywhere_it_ends_with_the_same_numbers(cut, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, 'quick', lambda cfg: cfg)               # the cut protocol, without its climb
    monkeypatch.setattr(module.torch, 'get_num_threads', lambda: 1)     # in this process, where it can be killed
    args = ['bench', '--quick', '--out']
    assert main([*args, 'whole']) == 0
    whole = json.loads((tmp_path/'results'/'bench_tiny_quick.json').read_text())
    assert set(whole) == SECTIONS
    # what a reader finds
    label = next(iter(whole['main']))
    assert list(whole['main'][label]) == ['CLIP', 'TeCoA', 'AGFT'] and set(whole['paired'][label]) == {'CLIP', 'TeCoA'}
    assert set(whole['ablation'][label]) == {'γ 0.4, 1/τ 85', 'γ 1.0, 1/τ 85'}
    for m, c in whole['calibration'].items():
        for kind in ('clean', 'adversarial'):
            for scale in ('training', 'own', 'fitted'): assert 0 <= c[kind][scale][MEAN]['ece'] <= 1 and set(c[kind][scale]) == {'source', MEAN}
    assert whole['calibration']['CLIP']['clean']['own'][MEAN]['overlap'] == 1 and abs(whole['calibration']['CLIP']['clean']['shrinkage'] - 1) < 1e-5
    assert whole['cost']['TeCoA']['ratio'] == 1 and all(0 < v['hypervolume'] <= 1 for v in whole['weights'].values())
    points = whole['weights']['AGFT']['points']
    assert len(points) == 3 and 'worst case 4/255' in whole['strong']
    page = (tmp_path/'whole'/'report.html').read_text()
    assert page.count('<table>') == 8 and page.count('data:image/png') == 3 and 'src="http' not in page
    # numbers are recounted from the flags
    task = cut('tiny')['zero_shot'][0]
    folder = next(p.parent for p in (tmp_path/'whole'/'main'/'AGFT-0').rglob(f'{task}.npz'))
    flags = [read_flags(tmp_path/'whole'/'main'/f'AGFT-{s}'/folder.name/f'{task}.npz') for s in (0, 1)]
    assert whole['main'][label]['AGFT'][task]['robust'] == pytest.approx(np.mean([f['robust'].mean() for f in flags]))
    # killed in the middle of training, of evaluation, of calibration
    for name in ('finetune', 'evaluate_threats', 'calibration_of', 'cost_of'):
        real, calls = getattr(module, name), []
        def dies(*a, **k):
            calls.append(1)
            if len(calls) == 2 or name == 'cost_of': raise KeyboardInterrupt
            return real(*a, **k)
        with monkeypatch.context() as m:
            m.setattr(module, name, dies)
            assert main([*args, 'parts']) == 130
    runs = {f: f.stat().st_mtime_ns for f in (tmp_path/'parts'/'runs').rglob('model.safetensors')}
    assert main([*args, 'parts']) == 0
    assert {'finished runs are not trained again' for f, t in runs.items() if f.stat().st_mtime_ns < t} == set()
    parts = json.loads((tmp_path/'results'/'bench_tiny_quick.json').read_text())
    assert without_times(parts) == without_times(whole)


def test_from_runs_that_diverge_the_climb_goes_down(cut, tmp_path):
    cfg = cut('tiny')
    cfg['methods'], cfg['tune']['ladder'] = {'TeCoA': {'scale': None, 'lr': 1e6}}, [1e5, 1e7]
    found = module.tuned(cfg, ['TeCoA'], tmp_path, 'cpu')['TeCoA']
    scores = found['scores']
    assert found['best'] == 1e5 and len(scores) == 4 and all(s['clean'] == 0 and ('not finite' in s['diverged'] or 'lower lr' in s['diverged']) for s in scores.values())


def test_every_preset_has_a_whole_protocol():
    for name in ('tiny', 'photo'):
        p = load_preset(name)
        assert set(p['demo']) <= set(p['methods']) and p['bench']['version'] >= 1
        for m in p['methods'].values(): module.neighbours(m['lr'])
        assert all(p['tune']['ladder'][0] <= m['lr'] <= p['tune']['ladder'][1] for m in p['methods'].values())
        for part in ('sweep', 'strong', 'unseen'):
            for t in p['bench'][part]['threats']:
                for e in p['bench'][part]['eps']: module.threat(t, module.pixels(e))


def test_quick_keeps_every_part():
    cfg = load_preset('tiny')
    small = module.quick(cfg)
    assert cfg == load_preset('tiny') and small['bench'].keys() == cfg['bench'].keys() and small['methods'] == cfg['methods']


def test_another_preset_without_protocol_is_refused(monkeypatch, tmp_path, capsys):
    def bare(name):
        p = load_preset(name); p.pop('bench'); return p
    monkeypatch.setattr(module, 'load_preset', bare)
    assert main(['bench', '--out', str(tmp_path/'b')]) == 2 and 'no bench protocol' in capsys.readouterr().err
