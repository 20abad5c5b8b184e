"""Does a larger teacher repair a compressed student better than the student's own dense self?

    python experiments/bigger_teacher.py $STUDENT --teacher $TEACHER --task sst2 --data-dir $DATA --seeds 0,1,2 \
        --max-steps 24 --batch 32 --accumulation 1 --lr 1e-4 --out runs/experiments

Teacher and student share one vocabulary (two models of train_test_model.py with one tokenizer, or two sizes of
facebook/opt-*). Both are tuned on the task first by the same rule. Rows: both dense models; the student distilled from
the teacher without any compression; clustered; clustered and distilled from its dense self, and from the teacher. The
two distillations differ in nothing but the teacher, and are compared question by question.

Writes bigger_teacher.json, .csv and .md.
"""

from dataclasses import dataclass
from pathlib import Path

from chai_jax.adapt.distil import check_vocabulary
from chai_jax.errors import InputError
from chai_jax.files.store import load
from lab.options import Options, Record, start
from lab.publish import publish
from lab.rows import columns, compare, row, signed
from lab.tree import Branch, Step, Tree, forest

CLUSTER = ("cluster",)


@dataclass(frozen=True)
class TeacherOptions(Options):
    teacher: str = ""
    """Hub id or folder of a larger dense OPT with the students' vocabulary."""


def distil_from(teacher: Tree) -> Step:
    """Distillation from another tree's dense model."""
    return lambda branch, model, keeping: branch.tree.stages.distil(model, teacher.base.model(), **keeping)


def of_students(trees: list[Tree], teachers: list[Tree]) -> tuple[list[Record], str]:
    """All rows of one student on one task, and whether the larger teacher is the better one."""
    stage = f"distil-from-{teachers[0].name}"
    for tree, teacher in zip(trees, teachers, strict=True):
        tree.steps[stage] = distil_from(teacher)
    branches, larger = [tree.base for tree in trees], [tree.base for tree in teachers]
    itself, taught = (*CLUSTER, "distil"), (*CLUSTER, stage)
    rows = [
        row(larger, (), "teacher, dense", None),
        row(branches, (), "student, dense", None),
        row(branches, (stage,), "student, dense, distilled from the teacher"),
        row(branches, CLUSTER, "student, clustered"),
        row(branches, itself, "student, clustered, distilled from its dense self"),
        row(branches, taught, "student, clustered, distilled from the teacher"),
    ]
    found = compare(*(_measured(branches, stages) for stages in (itself, taught)))
    return rows, (
        f"{trees[0].name} {trees[0].task}: the larger teacher minus the student's dense self {signed(found)} points, "
        f"{'more' if found['significant'] else 'not more'} than its error."
    )


def _measured(branches: list[Branch], stages: tuple[str, ...]) -> list:
    return [branch.measured(*stages) for branch in branches]


def bigger_teacher(options: TeacherOptions) -> Record:
    """All students and tasks."""
    if not options.teacher:
        raise InputError("no teacher is given; expected a hub id or folder of a larger OPT: --teacher MODEL")
    large = load(options.teacher)
    for model in options.model:
        if Path(model).name == Path(options.teacher).name:
            raise InputError(f"teacher and student are both called {Path(model).name}; expected two models")
        check_vocabulary(load(model), large)
    rows, findings = [], []
    for trees in forest(options):
        teachers = [Tree(options, options.teacher, tree.task, tree.seed) for tree in trees]
        mine, finding = of_students(trees, teachers)
        rows += mine
        findings.append(finding)
    shown = columns("model", "task", "row", "acc", "stderr", "difference", "kv_reduction", "model_reduction")
    return publish(options, "bigger_teacher", "A larger teacher, a smaller student", rows, shown, (), findings)


if __name__ == "__main__":
    start(bigger_teacher, TeacherOptions, __doc__)
