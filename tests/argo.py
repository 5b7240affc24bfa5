"""A small runner of Argo WorkflowTemplates, in this process.

It follows parameters, steps, sequences, retries and outputs as Argo does. A container is a call of
the command line in the environment that the template gives, and no other.
"""

import contextlib
import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from inkdask.cli import main


class FailedError(Exception):
    """A step failed, for the last time."""


class Runner:
    """Runs a workflow with parameters.

    Parameters
    ----------
    template
        The WorkflowTemplate.
    parameters
        Parameters of a submission.
    configured
        Data of the ConfigMaps and Secrets for the environment of pods, by kind and name.
    folder
        Folder in which each container gets a ``/tmp`` of its own.
    """

    def __init__(self, template, parameters, configured, folder):
        self.spec, self.configured, self.folder = template["spec"], configured, Path(folder)
        self.ran = []  # (name of the template, exit code) of each container
        self.globals = {}
        for declared in self.spec["arguments"]["parameters"]:
            value = parameters.pop(declared["name"], declared.get("value"))
            assert value is not None, f"parameter {declared['name']} is missing"
            self.globals[f"workflow.parameters.{declared['name']}"] = value
        assert not parameters, f"there are no parameters {parameters}"

    def run(self):
        """Run the entrypoint, and return its output parameters."""
        return self.template(self.spec["entrypoint"], {})["outputs.parameters"]

    def template(self, name, arguments):
        """Run a template; returns its outputs as ``outputs.result`` and ``outputs.parameters``."""
        [template] = [t for t in self.spec["templates"] if t["name"] == name]
        scope = dict(self.globals)
        for declared in template.get("inputs", {}).get("parameters", []):
            value = arguments.pop(declared["name"])
            scope[f"inputs.parameters.{declared['name']}"] = value
        assert not arguments, f"{name} does not take {arguments}"
        if "steps" in template:
            return self.steps(template, scope)
        return self.container(template, scope)

    def steps(self, template, scope):
        for group in template["steps"]:
            for step in group:
                for item in self.sequence(step, scope):
                    given = step.get("arguments", {}).get("parameters", [])
                    inner = {**scope, "item": item}
                    arguments = {p["name"]: filled(p["value"], inner) for p in given}
                    outputs = self.template(step["template"], arguments)
                    scope[f"steps.{step['name']}.outputs.result"] = outputs["outputs.result"]
                    for name, value in outputs["outputs.parameters"].items():
                        scope[f"steps.{step['name']}.outputs.parameters.{name}"] = value
        declared = template.get("outputs", {}).get("parameters", [])
        values = {p["name"]: filled(p["valueFrom"]["parameter"], scope) for p in declared}
        return {"outputs.result": "", "outputs.parameters": values}

    def sequence(self, step, scope):
        if "withSequence" not in step:
            return [""]
        return [str(n) for n in range(int(filled(step["withSequence"]["count"], scope)))]

    def container(self, template, scope):
        container, retry = template["container"], template["retryStrategy"]
        for attempt in range(int(retry["limit"]) + 1):
            tmp = self.folder / f"{template['name']}-{len(self.ran)}"
            tmp.mkdir(parents=True)
            code, said = self.call(container, scope, tmp)
            self.ran.append((template["name"], code))
            last = SimpleNamespace(exitCode=str(code))
            again = {"asInt": int, "lastRetry": last}
            if code == 0:
                break
            if attempt == int(retry["limit"]) or not eval(retry["expression"], again):
                raise FailedError(f"{template['name']} exited {code}")
        values = {}
        for declared in template.get("outputs", {}).get("parameters", []):
            file = Path(declared["valueFrom"]["path"])
            values[declared["name"]] = (tmp / file.relative_to("/tmp")).read_text()
        return {"outputs.result": said.rstrip("\n"), "outputs.parameters": values}

    def call(self, container, scope, tmp):
        """Run the command line of a container; returns its exit code and standard output."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp),
            "RESULT_FILE": str(tmp / "result_s3_url.txt"),  # /tmp is the container's own
        }
        for source in container["envFrom"]:
            for kind, reference in source.items():
                environment.update(self.configured[kind, reference["name"]])
        environment |= {e["name"]: filled(e["value"], scope) for e in container["env"]}
        program, *words = container["command"] + container["args"]
        assert program == "inkdask"
        said = io.StringIO()
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            contextlib.redirect_stdout(said),
        ):
            try:
                main([filled(word, scope) for word in words])
                code = 0
            except SystemExit as ended:
                code = ended.code
        return code, said.getvalue()


def filled(text, scope):
    """Replace ``{{name}}`` in a text by its value."""
    return re.sub(r"\{\{([^}]+)\}\}", lambda match: scope[match[1].strip()], text)
