"""Which packages a machine lacks for raydit, by the metadata of the installed packages."""

from missing_packages import main, missing_packages


def test_direct_and_indirect_needs_are_listed_without_what_is_there():
    found = missing_packages(("raydit",), ("torch", "numpy", "Pillow", "scikit_learn"))
    assert {"tomli-w", "annotated-types", "pydantic", "pydantic-core", "ray", "mlflow-skinny"} <= set(found)
    assert not {"torch", "numpy", "pillow", "scikit-learn", "sympy"} & set(found)


def test_extras_of_raydit_are_left_out_and_those_of_its_needs_are_not():
    found = missing_packages(("raydit",), ())
    assert not {"moto", "pytest", "timm", "peft", "torchao"} & set(found)
    assert "tensorboardx" in found  # of ray[train]
    assert set(missing_packages(("ray",), ())) < set(found)


def test_names_are_printed_one_a_line_with_further_packages(tmp_path, capsys):
    (tmp_path / "there.txt").write_text("torch, torchvision,\nray mlflow Diffusers.\n")
    main(str(tmp_path / "there.txt"), "torchao")
    printed = capsys.readouterr().out.splitlines()
    assert {"torchao", "tomli-w", "torch-fidelity"} <= set(printed)
    assert not {"raydit", "torch", "ray", "diffusers"} & set(printed)
