from pathlib import Path

README = Path(__file__).parents[2] / "server" / "README.md"


def test_every_endpoint_has_its_row(api):
    text = README.read_text()
    for route in api.client.app.routes:
        path = route.path.replace(":path", "").replace(":str", "")
        for method in route.methods - {"OPTIONS"}:
            if path != "/schema":  # the document again
                assert f"| `{method} {path}` |" in text, f"{method} {path} has no row in server/README.md"
