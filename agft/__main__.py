import sys

from agft.cli import main

sys.exit(main())
