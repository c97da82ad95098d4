"README's SLURM script, on two nodes that are one machine."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agft.loop import read_log

README = Path(__file__).parent.parent/'README.md'
SRUN = '''#!/bin/bash
# starts the command once for each node, as SLURM does
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & done
code=0
for job in $(jobs -p); do wait $job || code=$?; done
exit $code
'''


@pytest.mark.slow
def test_the_script_of_the_readme_trains_on_two_nodes(tmp_path):
    text = README.read_text(encoding='utf-8')
    script = re.search(r'```bash\n(#!/bin/bash\n#SBATCH.*?)```', text, re.DOTALL)
    assert script is not None
    (tmp_path/'train.slurm').write_text(script[1])
    for name, text in dict(srun=SRUN, scontrol='#!/bin/bash\necho localhost\necho localhost\n').items():
        (tmp_path/name).write_text(text)
        (tmp_path/name).chmod(0o755)
    env = os.environ | dict(
        PATH=f'{tmp_path}:{Path(sys.executable).parent}:{os.environ["PATH"]}', OMP_NUM_THREADS='1',
        SLURM_JOB_NODELIST='node[1-2]', SLURM_JOB_NUM_NODES='2', SLURM_JOB_ID='7', PRESET='tiny',
        DATA=str(tmp_path), OUT=str(tmp_path/'run'))
    small = ['--train.images', '16', '--train.batch-size', '8', '--train.steps', '2']
    subprocess.run(['bash', tmp_path/'train.slurm', *small], env=env, check=True, timeout=300)
    assert [line['step'] for line in read_log(tmp_path/'run')] == [0, 1]
    assert (tmp_path/'run'/'model.safetensors').is_file()
