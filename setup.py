from setuptools import find_packages, setup

# Everything else about the package stands in pyproject.toml.
# The kernels are a top-level folder in the repository and fastbert.kernels when installed. kernels/ has no __init__.py
# on purpose: an importable `kernels` would hide the package of that name that HuggingFace publishes.
setup(
    packages=[*find_packages(include=["fastbert*"]), "fastbert.kernels"],
    package_dir={"fastbert.kernels": "kernels"},
    # the mark of a typed package; settings measured per device
    package_data={"fastbert": ["py.typed"], "fastbert.kernels": ["profiles/*.json"]},
)
