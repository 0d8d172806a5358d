"""All kinds of sources. A new corpus is a new small file here and a line in `AnySource`."""

from typing import Annotated

from pydantic import Field

from data_prep.sources.chat import ChatTable
from data_prep.sources.hf_datasets import HuggingFaceDataset
from data_prep.sources.jsonl import JsonLines
from data_prep.sources.map_cc import MapCC
from data_prep.sources.megamath import MegaMathHighQuality, MegaMathWeb
from data_prep.sources.nemotron_cc import NemotronCC
from data_prep.sources.nemotron_code import NemotronCode
from data_prep.sources.nemotron_math import NemotronCCMath
from data_prep.sources.nemotron_sft import NemotronSftCode, NemotronSftGeneral, NemotronSftMath
from data_prep.sources.opencoder import OpenCoderAnnealing, OpenCoderPretrain
from data_prep.sources.prolong import ProLong
from data_prep.sources.python_library import PythonProse, PythonStdlib
from data_prep.sources.reasoning_sft import (
    AceReasonSft,
    DeepWriting,
    LlamaNemotronPostTraining,
    NemotronPostTraining,
    OO1Chat,
    OpenCodeReasoning,
    OpenThoughts3,
)
from data_prep.sources.sft_mix import SftMix
from data_prep.sources.tables import ArrowTable, ParquetTable
from data_prep.sources.text_folder import TextFolder
from data_prep.sources.ultra_fineweb import UltraFineWebZh

AnySource = (
    TextFolder
    | JsonLines
    | ParquetTable
    | ArrowTable
    | HuggingFaceDataset
    | ChatTable
    | NemotronCC
    | MapCC
    | UltraFineWebZh
    | OpenCoderPretrain
    | MegaMathWeb
    | MegaMathHighQuality
    | NemotronCCMath
    | NemotronCode
    | NemotronSftCode
    | NemotronSftGeneral
    | NemotronSftMath
    | OpenCoderAnnealing
    | ProLong
    | SftMix
    | OpenThoughts3
    | AceReasonSft
    | OpenCodeReasoning
    | LlamaNemotronPostTraining
    | NemotronPostTraining
    | OO1Chat
    | DeepWriting
    | PythonStdlib
    | PythonProse
)
SourceSettings = Annotated[AnySource, Field(discriminator="kind")]
