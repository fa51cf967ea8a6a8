"""Evaluation records that look real, of any size, for the tests of the report."""

import math
import random

WORDS = ("the", "of", "model", "a", "layer", "is", "expert", "for", "that", "<b>", "&", "reader")


def domain_quality(ratio, base, rng):
    value = base * ratio * (1 + 0.02 * rng.random())
    return {
        "perplexity": value,
        "low": value * 0.95,
        "high": value * 1.06,
        "tokens": 4096,
        "documents": 17,
    }


def speed(value):
    return {"median": value, "low": value * 0.96, "high": value * 1.03}


def model(name, kind, ratio, active, rates, bases, rng):
    return {
        "name": name,
        "kind": kind,
        "path": f"runs/{name}",
        "quality": {
            "domains": {d: domain_quality(ratio, base, rng) for d, base in bases.items()},
            "ratio": ratio,
            "ratio_low": 1.0 if kind == "dense" else ratio * 0.97,
            "ratio_high": 1.0 if kind == "dense" else ratio * 1.03,
        },
        "cost": {
            "active_ffn_fraction": active,
            "active_parameters": int(54_894_528 + 79_626_240 * active),
            "total_parameters": 134_515_008 if kind != "dsmoe" else 137_280_000,
            "router_parameters": 2_764_800 if kind == "dsmoe" else 0,
            "flops_per_token": int(2 * (54_894_528 + 79_626_240 * active)),
            "bytes": 538_060_032 if kind != "static-pruning" else 442_112_000,
        },
        "speed": {
            "prefill_tokens_per_s": speed(rates[0]),
            "decode_tokens_per_s": speed(rates[1]),
        },
    }


def tokens(domain, count, rng):
    if domain == "code":
        pieces = ["def", " f", "(", "x", "):", "\n", "    ", "return", " x", " <", " 1", "\n", "\t"]
    else:
        pieces = [" " + word for word in WORDS]
    return [
        {
            "text": pieces[i % len(pieces)] if domain == "code" else rng.choice(pieces),
            "active": min(1.0, max(0.2, rng.gauss(0.64, 0.07))),
        }
        for i in range(count)
    ]


def make_record(*, layers=30, experts=48, domains=("docs", "literature", "code"), steps=66, seed=0):
    """Build a whole record with the shape of a real one; deterministic for a seed."""
    rng = random.Random(seed)
    bases = dict(
        zip(domains, [11.6 + 60.7 * (i % 3 == 1) - i for i in range(len(domains))], strict=True)
    )
    w_shape = [
        min(
            0.98,
            0.58 + 0.22 * abs(math.cos(2 * math.pi * i / max(1, layers - 1))) + 0.03 * rng.random(),
        )
        for i in range(layers)
    ]
    return {
        "schema": 1,
        "created": "2026-01-15T10:12:00+00:00",
        "machine": {"cpu": "Example CPU 3000", "cores": 2, "torch": "2.13.0", "dtype": "float32"},
        "data": {
            "domains": {
                d: {
                    "tokens": 40960 * (i + 1),
                    "documents": 17 + i,
                    "sources": [
                        {"source": f"source of {d}", "licence": "PSF-2.0", "sha256": "ab" * 32}
                    ],
                }
                for i, d in enumerate(domains)
            },
            "block": 512,
        },
        "models": [
            model("dense", "dense", 1.0, 1.0, (1010.0, 38.2), bases, rng),
            model("flap", "static-pruning", 1.412, 0.642, (1420.0, 49.1), bases, rng),
            model("dsmoe", "dsmoe", 1.213, 0.638, (1310.0, 51.7), bases, rng),
        ],
        "curve": [
            {
                "threshold": 0.1 * i,
                "active_ffn_fraction": 1 - 0.085 * i,
                "ratio": 1.05 + 0.009 * i**2.2,
                "domains": {d: bases[d] * (1.05 + 0.009 * i**2.2) for d in domains},
            }
            for i in range(1, 9)
        ],
        "activation": {
            "experts_per_layer": [
                [min(1.0, max(0.0, rng.gauss(mean, 0.18))) for _ in range(experts)]
                for mean in w_shape
            ],
            "mean_per_layer": w_shape,
            "per_domain": {
                d: [v + 0.03 * (i - 1) + 0.01 * rng.random() for v in w_shape]
                for i, d in enumerate(domains)
            },
        },
        "examples": [
            {"domain": d, "tokens": tokens(d, 90, rng)} for d in domains for _ in range(2)
        ],
        "generations": [
            {
                "prompt": "What is a mixture of experts?",
                "texts": {
                    "dense": "A mixture of experts is a model made of parts. " * 4,
                    "flap": "A mixture is a mixture of a mixture. " * 4,
                    "dsmoe": "A mixture of experts is a network whose parts take turns. " * 3,
                },
            }
        ],
        "training": [
            {
                "step": i,
                "tokens": 512 * i,
                "loss": 2.6 + 1.4 * math.exp(-i / 20) + 0.05 * rng.random(),
                "kl": 0.25 + 1.1 * math.exp(-i / 18) + 0.02 * rng.random(),
                "active": 0.64 + 0.36 * math.exp(-i / 15),
                "sparse_coef": 0.01 * (1 - math.exp(-i / 25)),
            }
            for i in range(1, steps + 1)
        ],
        "manifest": {
            "format": 1,
            "parent": "sha256:" + "c0ffee" * 10,
            "versions": {"moesaic": "0.1.0", "torch": "2.13.0"},
            "steps": [
                {
                    "name": "convert",
                    "method": "dsmoe",
                    "config": {
                        "experts": experts,
                        "partition": {"method": "coactivation", "seed": 0},
                    },
                    "seconds": 41.23456789,
                },
                {
                    "name": "train",
                    "config": {"active": 0.64, "steps": steps, "what": ["routers", "ffn"]},
                },
            ],
        },
    }
