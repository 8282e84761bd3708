from setuptools import setup

setup(
    name="fastbert",
    version="0.1.0",
    # The kernels are a top-level folder in the repository and fastbert.kernels when installed.
    # kernels/ has no __init__.py on purpose: an importable `kernels` would hide the PyPI package of that name.
    packages=["fastbert", "fastbert.kernels"],
    package_dir={"fastbert.kernels": "kernels"},
    python_requires=">=3.10",
    install_requires=["torch>=2.8", "triton>=3.4; platform_system == 'Linux'"],
)
