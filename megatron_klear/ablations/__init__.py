"""The paper's ablations as experiments: arms over seeds, claims judged with intervals."""
