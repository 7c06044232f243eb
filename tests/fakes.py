"""Stand-ins for what jobs talk to, so that their parts can be tested without Ray and MLflow."""


class FakeContext:
    """A StageContext that shows nothing."""

    def progress(self, stage, **settings):
        return FakeProgress()

    def say(self, stage, text):
        pass


class FakeProgress:
    """A Progress that shows nothing."""

    def to(self, count, **details):
        pass

    def done(self, text):
        pass


class FakeRun:
    """A RunLog that remembers what it is given."""

    def __init__(self, points=None):
        """points: metrics of earlier commands, by name without "train/" and by step."""
        self._points = points or {}
        self.logged, self.models, self.removed, self.files = {}, {}, [], []

    def points(self, prefix):
        return {name: dict(values) for name, values in self._points.items()}

    def metrics(self, metrics, step=0, **about):
        """Remembered in `logged`, by name and step."""
        for name, value in metrics.items():
            self.logged.setdefault(name, {})[step] = value

    def values(self, name):
        return self.logged.get(name, {})

    def model(self, digest, *, name, step, params, tags):
        """Remembered in `models`: name, step and URI by digest."""
        self.models[digest] = (name, step, tags["raydit.checkpoint"])

    def model_removed(self, digest):
        self.removed.append(digest)

    def artifact(self, path, folder=None):
        self.files.append((path, folder))

    def image(self, path, key, step):
        self.files.append((path, key))
