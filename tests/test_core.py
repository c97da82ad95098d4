"Progress where it can be drawn and where it cannot; jobs in parallel; files and locks."
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import agft.core as core
from agft.core import AgftError, Progress, cached_json, locked, open_run, parallel_map, read_json, whole_file

class File(list):
    "An error stream that is a file."
    def write(self, text): self.append(text)
    def flush(self): pass
    def isatty(self): return False


@pytest.fixture
def clock(monkeypatch):
    "Time that the test sets."
    now = [0.]
    monkeypatch.setattr('time.monotonic', lambda: now[0])
    return now


def test_in_a_file_progress_is_a_line_now_and_then(monkeypatch, clock):
    stderr = File()
    monkeypatch.setattr('sys.stderr', stderr)
    with Progress('AGFT, seed 0', 400, unit='image') as shown:
        for clock[0] in (59, 61, 62, 122):
            shown.update(100, 'loss 2.5')
    lines = [text for text in stderr if text.strip()]
    assert len(lines) == 2, lines
    assert lines[0].startswith('AGFT, seed 0:  50%') and '200/400' in lines[0] and 'loss 2.5' in lines[0]
    assert '01:01<01:01' in lines[0], 'the time that is left'


def test_the_time_left_of_a_continued_run_is_that_of_its_own_steps(monkeypatch, clock):
    "It goes on at step 10 of 20 and takes 16 s a step."
    stderr = File()
    monkeypatch.setattr('sys.stderr', stderr)
    with Progress('AGFT, seed 0', 20, 10, 'step') as shown:
        for clock[0] in range(16, 176, 16):
            shown.update(1, 'loss 2.5')
    first, second = [text for text in stderr if text.strip()]
    assert '14/20 [01:04<01:36' in first and '18/20 [02:08<00:32' in second


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    stderr = Terminal()
    monkeypatch.setattr('sys.stderr', stderr)
    with Progress('pgd20', 400) as shown:
        shown.update(400)
    assert 'pgd20' in stderr.getvalue() and '\r' in stderr.getvalue()


def test_a_worker_process_draws_no_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.setattr('sys.stderr', Terminal())
    monkeypatch.setenv('AGFT_WORKER', '1')
    assert Progress('pgd20', 400).bar is None


def test_jobs_in_parallel_keep_their_order(monkeypatch):
    jobs = [(2, k) for k in range(6)]
    for threads in (1, 2):
        monkeypatch.setattr('torch.get_num_threads', lambda threads=threads: threads)
        assert parallel_map(pow, jobs, 'cpu') == [1, 2, 4, 8, 16, 32]


def test_workers_are_in_the_directory_of_the_call(tmp_path, monkeypatch):
    monkeypatch.setattr('torch.get_num_threads', lambda: 2)
    for name in ('first', 'second'):
        (tmp_path/name).mkdir()
        monkeypatch.chdir(tmp_path/name)
        found = parallel_map(os.path.abspath, [('a',), ('b',)], 'cpu')
        assert found == [str(tmp_path/name/'a'), str(tmp_path/name/'b')]


# -- files

@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_cannot_be_written_is_one_line_and_changes_nothing(tmp_path, monkeypatch, number):
    file = tmp_path/'a.json'
    file.write_text('old')
    def fails(*args): raise OSError(number, os.strerror(number))
    with monkeypatch.context() as patch, pytest.raises(AgftError, match=os.strerror(number)) as e:
        patch.setattr(os, 'fsync', fails)
        with whole_file(file) as temporary:
            temporary.write_text('new')
    assert str(file) in str(e.value) and '\n' not in str(e.value)
    assert [f.name for f in tmp_path.iterdir()] == ['a.json'] and file.read_text() == 'old'


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path):
    with whole_file(tmp_path/'a') as one, whole_file(tmp_path/'a') as two:
        one.write_text('1')
        two.write_text('2')
        assert one != two
    assert (tmp_path/'a').read_text() == '1'  # the outer block ends last


@pytest.mark.parametrize('text', ['[]', '3', 'null', '{}', '"a"'])
def test_a_run_json_of_another_kind_is_one_line(tmp_path, text):
    (tmp_path/'run.json').write_text(text)
    (tmp_path/'state.pt').touch()
    with pytest.raises(AgftError, match='is of another run'), open_run(tmp_path, dict(seed=0)):
        pass


def test_a_directory_in_which_nothing_was_computed_is_taken_over(tmp_path):
    with open_run(tmp_path, dict(seed=0)):
        pass
    with open_run(tmp_path, dict(seed=1)) as folder:
        (folder/'state.pt').touch()
    assert read_json(tmp_path/'run.json') == dict(seed=1)
    with pytest.raises(AgftError, match=r'seed \(1 there, 2 now\)'), open_run(tmp_path, dict(seed=2)):
        pass
    with pytest.raises(AgftError, match='an output of agft eval|an output of eval'):
        core.check_same(tmp_path, dict(command='eval'), dict(command='train'))


def test_a_deep_json_is_one_line(tmp_path):
    (tmp_path/'a.json').write_text('['*100_000)
    with pytest.raises(AgftError, match='not readable as JSON'):
        read_json(tmp_path/'a.json')


@pytest.mark.parametrize('text', ['[]', '{}', '{"value": 1}', '{"value": 1, "sha256": "0", "about": {}}'])
def test_a_cached_value_without_its_checksum_is_refused(tmp_path, text):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(AgftError, match='changed or damaged'):
        cached_json(tmp_path/'a.json', lambda: 1, {})


# -- locks and processes

def start(code, *words):
    "A Python process; returns it when it has printed a line."
    words = [sys.executable, '-c', code, *map(str, words)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()


HOLDS = """
import sys, time
from agft.core import locked
with locked(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_stale_lock_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(core, '_PATIENCE', .2)
    process, _ = start(HOLDS, tmp_path)
    with pytest.raises(AgftError, match=f'in use by process {process.pid} on '), locked(tmp_path):
        pass
    (tmp_path/'.a.json.12345678.tmp').write_text('half')
    process.kill()
    process.wait()
    with locked(tmp_path) as folder:
        assert not [*folder.glob('.*.tmp')]
    assert not (tmp_path/'.owner').exists()


def test_a_folder_that_cannot_be_written_is_read_without_a_lock(tmp_path, monkeypatch):
    with open_run(tmp_path, dict(seed=0)):
        pass
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with open_run(tmp_path, dict(seed=0)) as folder:
        assert sorted(folder.iterdir()) == before


WORKS = """
import os, sys, time
import torch
from agft.core import parallel_map
def work(i):
    os.write(1, b'%d\\n' % os.getpid())  # as a whole, also beside another worker's
    time.sleep(60)
torch.set_num_threads(2)
parallel_map(work, [(0,), (1,)], 'cpu')
"""


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().split()[2] != 'Z'
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(number):
    process, workers = start(WORKS)
    assert alive(workers[0])
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 5
    while alive(workers[0]) and time.monotonic() < deadline:
        time.sleep(.1)
    assert not alive(workers[0])


# -- a cluster

def slow_square(i, folder):
    "Says which process works, and takes a while."
    (folder/f'{i}-{os.getpid()}').touch()
    time.sleep(1.5)
    return i*i


@pytest.mark.slow
def test_a_cluster_goes_on_without_a_worker_that_was_killed(tmp_path):
    distributed = pytest.importorskip('distributed')
    def kill():
        while not [*tmp_path.iterdir()]:
            time.sleep(.05)
        os.kill(int(next(tmp_path.iterdir()).name.split('-')[1]), signal.SIGKILL)
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, core.on_cluster(cluster.scheduler_address):
        thread = threading.Thread(target=kill)
        thread.start()
        found = parallel_map(slow_square, [(i, tmp_path) for i in range(6)], 'cpu')
        thread.join()
    assert found == [i*i for i in range(6)]
    assert len({file.name.split('-')[1] for file in tmp_path.iterdir()}) >= 2


def test_a_scheduler_that_is_not_there_is_one_line():
    pytest.importorskip('distributed')
    with pytest.raises(AgftError, match='no scheduler at'), core.on_cluster('nonsense'):
        pass
