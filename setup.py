"""All package metadata; pyproject.toml holds only the build system and tool settings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    # Read as text: importing the package would need torch, which is absent while the package is being built.
    text = (ROOT / "opara_backend" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('opara_backend/_version.py holds no line of the form __version__ = "..."')
    return found.group(1)


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="opara-backend",
    version=version(),
    description="A torch.compile backend that runs Inductor's kernels side by side on several CUDA streams",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="The Opara backend authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["pytorch", "torch.compile", "inductor", "cuda graph", "cuda streams", "scheduling", "inference"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Software Development :: Compilers",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["opara_backend", "opara_backend.*"]),
    package_data={"opara_backend": ["py.typed", "scheduling/README.md", "report/assets/*"]},
    install_requires=[
        "torch>=2.11",
        'triton; platform_system == "Linux"',
        "sympy",
        "rich",  # tables; loaded only when a report is printed
    ],
    extras_require={
        # matplotlib brings the photograph that the demo looks at, so nothing is downloaded.
        "demo": ["matplotlib", "numpy", "pillow", "rich"],
        "test": [
            *("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "networkx", "numpy", "rich"),
            *("fastapi", "httpx", "selenium", "tlparse", "uvicorn"),
        ],
        "examples": ["fastapi", "httpx", "matplotlib", "numpy", "pillow", "uvicorn"],
        # Exact, because a new release of either finds new faults in code that did not change.
        "lint": ["ruff==0.17.6", "mypy==2.4.1"],
        "bench": ["matplotlib", "numpy", "rich"],
        "docs": ["mkdocs>=1.6"],
    },
    # Dynamo reads this group: after installation torch.compile knows backend="opara" without any import.
    entry_points={"torch_dynamo_backends": ["opara = opara_backend.backend:opara"]},
)
