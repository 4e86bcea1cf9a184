"""The wheel and the sdist in a folder hold exactly what they should, and the page on PyPI leads nowhere beside it."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = {
    f"asgi_deferred/{path.name}"
    for path in (ROOT / "asgi_deferred").iterdir()
    if path.suffix in (".py", ".html") or path.name == "py.typed"
}
TO_BUILD_FROM = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
ABOUT = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}

(wheel,), (sdist,) = (list(Path(sys.argv[1]).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
name = sdist.name.removesuffix(".tar.gz")

with zipfile.ZipFile(wheel) as file:
    held = set(file.namelist())
    metadata = file.read(f"{name}.dist-info/METADATA").decode()
expected = PACKAGE | {f"{name}.dist-info/{each}" for each in ABOUT}
assert held == expected, f"the wheel: {sorted(held ^ expected)}"

with tarfile.open(sdist) as file:
    held = {member.name for member in file if member.isfile()}
expected = {f"{name}/{each}" for each in PACKAGE | TO_BUILD_FROM}
assert held == expected, f"the sdist: {sorted(held ^ expected)}"

prose = re.sub(r"^```.*?^```$", "", metadata, flags=re.MULTILINE | re.DOTALL)
relative = [target for target in re.findall(r"\]\(([^)]*)\)", prose) if not re.match("https?:|#", target)]
assert relative == [], relative
