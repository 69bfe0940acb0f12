"""`torchrun -m slm.train ATTEMPT_FOLDER`."""

import sys

from slm.train.trainer import main

sys.exit(main())
