"""Nothing is fetched, and the code that transformers is to trust goes into a folder of the session's own: to be said
before it is imported.
"""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="jmoe-huggingface-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
