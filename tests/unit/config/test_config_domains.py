from __future__ import annotations

import pytest

from megatron.config.data import split_shares
from megatron.config.domains import names_of, parent_names
from megatron.errors import ConfigError


def own(load, text, *overrides):
    return load(text, *overrides, without=["domains"])


@pytest.mark.option("data_path", "split")
def test_single_path(load):
    config = own(load, "data_path: data/enwik8/enwik8_text_document\nsplit: 90/5/5\n")
    assert list(config.domains) == ["enwik8"]
    assert config.domains["enwik8"].weight == 1.0
    assert config.domains["enwik8"].uses_split
    assert config.split == "90/5/5"


@pytest.mark.option(
    "train_data_paths",
    "valid_data_paths",
    "test_data_paths",
    "train_data_weights",
    "valid_data_weights",
)
def test_lists_with_weights(load):
    config = own(
        load,
        "train-data-paths: [d/a_text_document, d/b_text_document]\ntrain-data-weights: [1., 2]\n"
        "valid-data-paths: [v/b_text_document, v/a_text_document]\nvalid-data-weights: [1, 1]\n"
        "test-data-paths: [t/x, t/y]\n",
    )
    a, b = config.domains["a"], config.domains["b"]
    assert (a.train, a.valid, a.test, a.weight) == (
        ("d/a_text_document",), ("v/a_text_document",), ("t/x",), 1.0)  # fmt: skip
    assert (b.valid, b.weight) == (("v/b_text_document",), 2.0)
    assert not a.uses_split
    assert a.prefixes("valid") == ("v/a_text_document",)
    assert (a.valid_weight, b.valid_weight, a.test_weight) == (1.0, 1.0, None)


@pytest.mark.option(
    "valid_data_paths",
    "valid_data_weights",
    "test_data_paths",
    "test_data_weights",
)
def test_lists_of_other_lengths_are_matched_by_name_and_the_rest_is_only_measured(load):
    config = own(
        load,
        "train_data_paths: [d/a, d/b, d/c]\nvalid_data_paths: [v/held, v/b]\n"
        "valid_data_weights: [3, 1]\ntest_data_paths: [t/last]\ntest_data_weights: [2]\n",
    )
    assert list(config.trained) == ["a", "b", "c"]
    assert config.domains["b"].valid == ("v/b",)
    assert config.domains["a"].valid is None
    held, last = config.domains["held"], config.domains["last"]
    assert held.target
    assert (held.valid, held.valid_weight) == (("v/held",), 3.0)
    assert last.target
    assert (last.test, last.test_weight, last.valid) == (("t/last",), 2.0, None)


@pytest.mark.option("train_label_data_paths", "valid_label_data_paths", "test_label_data_paths")
def test_labels_stand_in_the_order_of_the_paths(load):
    config = own(
        load,
        "train_data_paths: [d/a, d/b]\ntrain_label_data_paths: [l/0, l/1]\n"
        "valid_data_paths: [v/b, v/a]\nvalid_label_data_paths: [m/0, m/1]\n",
    )
    a, b = config.domains["a"], config.domains["b"]
    assert (a.labels("train"), a.labels("valid"), a.labels("test")) == (("l/0",), ("m/1",), None)
    assert (b.labels("train"), b.labels("valid")) == (("l/1",), ("m/0",))
    single = own(load, "data_path: d/a\ntrain_label_data_paths: [l/0]\n").domains["a"]
    assert single.labels("train") == single.labels("valid") == ("l/0",)


def test_default_weight_is_one_each(load):
    config = own(load, "train_data_paths: [d/a, d/b]\n")
    assert [domain.weight for domain in config.domains.values()] == [1.0, 1.0]


@pytest.mark.option("use_named_train_datasets", "use_named_eval_datasets")
def test_named_data_takes_the_folder(load):
    config = own(
        load,
        "train_data_paths: [p/Pile-CC/train, p/ArXiv/train]\nuse_named_train_datasets: true\n"
        "valid_data_paths: [q/ArXiv/val]\nuse_named_eval_datasets: true\n",
    )
    assert list(config.domains) == ["Pile-CC", "ArXiv"]
    assert config.domains["ArXiv"].valid == ("q/ArXiv/val",)
    assert config.domains["Pile-CC"].valid is None


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/code_text_document", "y/prose_text_document"], ["code", "prose"]),
        (["code/train_text_document", "prose/train_text_document"], ["code", "prose"]),
        (["a/x/train", "b/x/train"], ["x_train", "x_train"]),
        (["a/x_train_document", "b/y_train_document"], ["x", "y"]),
        (["a", "b"], ["a", "b"]),
        (["_document"], ["_document"]),
    ],
)
def test_names_of_paths(paths, names):
    assert names_of(paths) == names


def test_parent_names():
    assert parent_names(["x/y/z", "z"]) == ["y", "z"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data_path: a\ntrain_data_paths: [b]\n", "contradicts data_path"),
        ("data_path: a\ndomains: {b: {train: c}}\n", "contradicts the domains block"),
        ("valid_data_paths: [b]\n", "needs train_data_paths"),
        ("data_path: [a, b]\n", "path of one data set"),
        ("train_data_paths: [1, b]\n", "train_data_paths[0]: 1: should be a path"),
        ("train_data_paths: []\n", "at least one path"),
        ("train_data_paths: [a, b]\ntrain_data_weights: [1]\n", "1 weights for 2"),
        ("train_data_paths: [a, b]\ntrain_data_weights: [1, x]\n", "train_data_weights[1]: 'x'"),
        ("train_data_paths: [a, b]\ntrain_data_weights: [0, 0]\n", "every weight is 0"),
        ("train_data_paths: [a, b, c]\nvalid_data_paths: [x, x]\n", "cannot be matched"),
        (
            "train_data_paths: [a, b]\nvalid_data_paths: [a]\nvalid_data_weights: [1, 1]\n",
            "2 weights for 1 valid_data_paths",
        ),
        (
            "train_data_paths: [a, b]\ntrain_label_data_paths: [x]\n",
            "1 paths for 2 train_data_paths",
        ),
        ("train_label_data_paths: [x]\n", "needs train_data_paths"),
        ("data_path: a\nvalid_label_data_paths: [x]\n", "give train_label_data_paths"),
        ("train_data_paths: [x/a/train, y/a/train]\n", "the same domain name 'a_train'"),
        ("data_path: a\nweight_by_num_documents: 3\n", "should be true or false"),
    ],
)
def test_problems_have_a_place(load, text, said):
    with pytest.raises(ConfigError) as error:
        own(load, text)
    assert said in str(error.value)
    assert "a.yml:" in str(error.value)


@pytest.mark.option("weight_by_num_documents", "weighted_sampler_alpha")
def test_weights_by_documents(load):
    config = own(
        load,
        "train_data_paths: [d/a, d/b]\nweight_by_num_documents: true\nweighted_sampler_alpha: 1\n",
    )
    assert config.mixing.weights == "documents"
    assert config.mixing.weights_alpha == 1.0
    assert own(load, "data_path: a\nweighted_sampler_alpha: 0.3\n").ignored


@pytest.mark.option(
    "data_sampling_method",
    "data_sampling_warmup_steps",
    "data_sampling_update_frequency",
    "data_sampling_smoothing_factor",
    "mixed_minibatches",
)
def test_sampling_keys_of_the_fork(load):
    config = load(
        "data_sampling_method: smoothed_mean\ndata-sampling-warmup-steps: 10\n"
        "data_sampling_update_frequency: 5\ndata_sampling_smoothing_factor: 0.5\n"
        "mixed_minibatches: true\n"
    )
    mixing = config.mixing
    assert (mixing.method, mixing.unit, mixing.draw) == (
        "smoothed_mean", "micro_batch", "multinomial")  # fmt: skip
    options = mixing.options
    assert (options["warmup_steps"], options["update_every"], options["pool"]) == (10, 5, False)
    assert options["smoothing_factor"] == 0.5


@pytest.mark.option("mixed_batches")
def test_fork_keys_with_other_units_and_methods(load):
    assert load("data_sampling_method: exp3\nmixed_batches: true\n").mixing.unit == "sample"
    config = load("data_sampling_method: exp3\ndata_sampling_smoothing_factor: 0.5\n"
                  "data_sampling_update_frequency: 0\n")  # fmt: skip
    assert config.mixing.unit == "step"
    assert config.mixing.options["update_every"] == 1
    assert config.ignored[0].startswith("data_sampling_smoothing_factor: the method 'exp3'")
    config = load("data_sampling_warmup_steps: 10\nmixed_batches: false\n")
    assert config.mixing.method == "static"
    assert len(config.ignored) == 1


@pytest.mark.option(
    "validation_based_reward", "batch_normalized_reward", "scale_by_reward_loss_diff"
)
def test_rewards_of_the_fork_choose_the_method(load):
    text = "data_sampling_method: exp3\nmixed_minibatches: true\nvalidation_based_reward: true\n"
    mixing = load(text + "batch_normalized_reward: true\n").mixing
    assert (mixing.method, mixing.unit) == ("validation_gap", "micro_batch")
    assert mixing.options["batch_normalized_reward"]
    assert not mixing.options["scale_by_reward_loss_diff"]
    assert load(text + "scale_by_reward_loss_diff: true\n").mixing.options[
        "scale_by_reward_loss_diff"
    ]
    naive = load(
        "data_sampling_method: naive_validation\nmixed_batches: true\n"
        "validation_based_reward: true\nbatch_normalized_reward: false\n"
    )
    assert (naive.mixing.method, naive.ignored) == ("naive_validation", ())
    off = load("data_sampling_method: exp3\nbatch_normalized_reward: true\n")
    assert off.mixing.method == "exp3"
    assert off.ignored == ("batch_normalized_reward: belongs to validation_based_reward with exp3",)


@pytest.mark.parametrize(
    "text",
    [
        "data_sampling_method: validation_based_reward\n",
        "data_sampling_method: exp3\nmixing: {method: odm}\n",
        "data_sampling_method: exp3\nmixed_batches: 3\n",
        "data_sampling_method: exp3\ndata_sampling_warmup_steps: -1\n",
        "data_sampling_method: smoothed_mean\nvalidation_based_reward: true\n",
        "data_sampling_method: exp3\nvalidation_based_reward: 1\n",
        "data_sampling_method: [exp3]\n",
    ],
)
def test_fork_keys_that_cannot_be_mapped(load, text):
    with pytest.raises(ConfigError):
        load(text)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("969, 30, 1", (0.969, 0.03, 0.001)),
        ("1/1/2", (0.25, 0.25, 0.5)),
        ("5", (1.0, 0.0, 0.0)),
        ("9,1", (0.9, 0.1, 0.0)),
    ],
)
def test_split_shares(text, shares):
    assert split_shares(text) == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", " ", "a", "1,2,3,4", "-1,1,1", "0,1,1", "nan,1,1", "inf,1"])
def test_bad_splits(text):
    with pytest.raises(ValueError, match=r"split|share"):
        split_shares(text)
