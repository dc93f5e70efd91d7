"""Maps the top-level folders into the `lowbit_video` package; everything else stands in pyproject.toml.

`kernels`, `pipelines` and `eval` are folders of the checkout but not packages of their own: in an
environment they are `lowbit_video.kernels`, `lowbit_video.pipelines` and `lowbit_video.eval`. What was tried on the way,
`eval/speed/experiments`, stays in the checkout.
"""
from setuptools import find_packages, setup

MAPPED = {"lowbit_video.kernels": "kernels", "lowbit_video.pipelines": "pipelines", "lowbit_video.eval": "eval"}

packages = ["lowbit_video"] + [f"lowbit_video.{name}" for name in find_packages("lowbit_video")]
for name, folder in MAPPED.items():
    packages += [name] + [f"{name}.{sub}" for sub in find_packages(folder, exclude=["speed.experiments"])]
packages.append("lowbit_video.eval.report.assets")  # without code, but setuptools takes any folder for a package

setup(packages=packages, package_dir={"lowbit_video": "lowbit_video", **MAPPED},
      package_data={"lowbit_video.kernels.shipped": ["manifest.json", "images.zip"],
                    "lowbit_video.eval.report.assets": ["*"], "lowbit_video.distributed.cost": ["measured.json"],
                    "lowbit_video.hook.recipe": ["*.toml"]})
