"""All kinds of sources. A new corpus is a new small file here and a line in `SourceSettings`."""

from typing import Annotated

from pydantic import Field

from data_prep.sources.jsonl import JsonLines
from data_prep.sources.python_library import PythonProse, PythonStdlib
from data_prep.sources.text_folder import TextFolder

AnySource = TextFolder | JsonLines | PythonStdlib | PythonProse
SourceSettings = Annotated[AnySource, Field(discriminator="kind")]
