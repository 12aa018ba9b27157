"""What opens a folder of weights elsewhere: the code and the index that diffusers wants, and the way to the Hub."""

import ast
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi

from infra.commands import ROOT, InputError

PIPELINE_PARTS = ("labels.py", "diffusion.py", "pipeline.py")  # of the project, from the bottom up
LOCAL_MODULES = {Path(name).stem for name in PIPELINE_PARTS}


# --------------------------------------------------------------------------------------------- code and index


def bundled_pipeline() -> str:
    """`PIPELINE_PARTS` as one file that needs nothing of the project: their imports, then what follows these."""
    plain = set()  # import ...
    names: dict[str | None, set[str]] = defaultdict(set)  # from module import names
    bodies = []
    for name in PIPELINE_PARTS:
        text = (ROOT / name).read_text()
        tree = ast.parse(text)
        last_line = 0
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                last_line = node.end_lineno or 0
                if isinstance(node, ast.Import):
                    plain.add(ast.unparse(node))
                elif node.module not in LOCAL_MODULES:
                    names[node.module].update(map(ast.unparse, node.names))
        bodies.append(f"# {'-' * 30} {name}\n\n\n" + "\n".join(text.splitlines()[last_line:]).strip())
    docstring = ast.get_docstring(ast.parse((ROOT / "pipeline.py").read_text()))
    head = f'"""{docstring}\n"""\n\n# Written by checkpoint.py of iclevr-ddpm from its {", ".join(PIPELINE_PARTS)}.\n\n'
    imports = sorted(plain)
    for module in sorted(names, key=str):
        imports.append(f"from {module} import {', '.join(sorted(names[module]))}")
    return head + "\n".join(imports) + "\n\n" + "\n\n\n".join(bodies) + "\n"


def pipeline_files(metadata: dict, objects: dict[str, int]) -> dict[str, str]:
    """Name -> text of the files beside weights with which DiffusionPipeline.from_pretrained loads them. `metadata`: of
    the weights; `objects`: name -> index in the label."""
    index = {
        "_class_name": ["pipeline", "ConditionalDDPMPipeline"],
        "_diffusers_version": version("diffusers"),
        "objects": objects,
        "sampling": metadata["sampling"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["network", "ConditionalUNet"],
    }
    return {
        "model_index.json": json.dumps(index, indent=1) + "\n",
        "pipeline.py": bundled_pipeline(),
        "unet/network.py": (ROOT / "network.py").read_text(),
    }


# -------------------------------------------------------------------------------------------------------- hub


def push(folder: Path, name: str):
    """Upload a folder of weights to the Hub as the model `name`, made if it is not there. Raises InputError."""
    api = HfApi()
    try:
        repo = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Weights, pipeline and model card")
    except Exception as error:  # of the Hub, and of the library below it, which differs with the version
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--push-to-hub {name}: {reason} (`hf auth login` gives it a token)") from None
    print(f"uploaded: {repo}")
