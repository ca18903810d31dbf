import pytest
import torch
import torch.nn.functional as F

from ijepa_zoo.eval.logistic import choose_logistic, fit_logistic, logistic_loss

datasets = pytest.importorskip("sklearn.datasets")
linear_model = pytest.importorskip("sklearn.linear_model")


def digits(dtype=torch.float32):
    """8 x 8 photographs of handwritten digits: 1297 for training and 500 for testing."""
    x, y = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    features, labels = torch.tensor(x, dtype=dtype)[order] / 16, torch.tensor(y)[order]
    return features[:1297], labels[:1297], features[1297:], labels[1297:]


@pytest.mark.parametrize("l2", [1e-3, 1e-2])
@pytest.mark.parametrize("standardise", [False, True])
def test_equals_scikit_learn_on_digits(l2, standardise):
    train, labels, test, answers = digits(torch.float64)
    mine = fit_logistic(train, labels, l2, standardise=standardise, tolerance=1e-7)
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    mean, std = (mean, std.where(std > 0, 1.0)) if standardise else (0.0, 1.0)
    theirs = linear_model.LogisticRegression(
        C=1 / (len(train) * l2), solver="newton-cg", tol=1e-9, max_iter=1000
    )
    theirs.fit(((train - mean) / std).numpy(), labels.numpy())
    assert mine.converged
    expected = torch.from_numpy(theirs.decision_function(((test - mean) / std).numpy()))
    found = mine.logits(test)  # a bias that is equal for all classes changes nothing
    centred = (logits - logits.mean(dim=1, keepdim=True) for logits in (found, expected))
    torch.testing.assert_close(*centred, rtol=0, atol=5e-3)
    accuracy = theirs.score(((test - mean) / std).numpy(), answers.numpy())
    assert mine.correct(test, answers) == round(accuracy * len(test))


def test_float32_reaches_the_accuracy_of_float64():
    for l2 in (1e-5, 1e-3):
        single, double = (
            fit_logistic(*digits(dtype)[:2], l2) for dtype in (torch.float32, torch.float64)
        )
        assert single.weight.dtype == torch.float32
        assert single.converged
        assert single.objective == pytest.approx(double.objective, rel=1e-4)
        right = [f.correct(*digits(f.weight.dtype)[2:]) for f in (single, double)]
        assert right[0] == pytest.approx(right[1], abs=1)


def test_loss_and_gradients_equal_autograd_over_several_pieces(monkeypatch):
    monkeypatch.setattr("ijepa_zoo.eval.logistic._ROWS", 100)
    train, labels, *_ = digits(torch.float64)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(10, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(F.linear(train, weight, bias), labels)
    expected.backward()
    loss, by_weight, by_bias = logistic_loss(weight.detach(), bias.detach(), train, labels)
    assert loss == pytest.approx(float(expected.detach()))
    torch.testing.assert_close(by_weight, weight.grad)
    torch.testing.assert_close(by_bias, bias.grad)


def test_reported_figures_are_those_of_the_returned_weights():
    train, labels, *_ = digits(torch.float64)
    fitted = fit_logistic(train, labels, 1e-3)
    loss = F.cross_entropy(fitted.logits(train), labels)
    assert fitted.loss == pytest.approx(float(loss))
    spread = train.std(dim=0, correction=0)
    penalty = 5e-4 * (fitted.weight * spread).square().sum()
    assert fitted.objective == pytest.approx(float(loss + penalty))
    assert fitted.gradient <= 1e-5


def test_path_chooses_on_held_out_images_and_prefers_strong_penalties():
    train, labels, held, answers = digits()
    l2s = (1e-5, 10.0, 1e-3, 1e-1)
    path = choose_logistic(train, labels, held, answers, l2s)
    alone = {l2: fit_logistic(train, labels, l2).correct(held, answers) for l2 in l2s}
    assert list(path.correct) == sorted(l2s, reverse=True)
    for l2 in l2s:
        assert path.correct[l2] == pytest.approx(alone[l2], abs=1), "a warm start finds the same"
    most = max(path.correct.values())
    assert path.best.l2 == max(l2 for l2 in l2s if path.correct[l2] == most)
    assert path.best.correct(held, answers) == most
    assert path.correct[10.0] < most
    same = choose_logistic(train, labels, held[:1], path.best.logits(held[:1]).argmax(1), l2s)
    assert same.best.l2 == 10.0 or same.correct[10.0] == 0


def test_too_few_iterations_are_told():
    train, labels, *_ = digits()
    fitted = fit_logistic(train, labels, 1e-4, max_iterations=3)
    assert not fitted.converged
    assert fitted.gradient > 1e-5


def test_a_class_without_images_and_a_constant_feature_do_no_harm():
    train, labels, *_ = digits()
    train = torch.cat([train, torch.full((len(train), 1), 3.0)], dim=1)
    fitted = fit_logistic(train, labels, 1e-3, num_classes=12)
    assert fitted.weight.shape == (12, 65)
    assert fitted.weight.isfinite().all()
    assert fitted.correct(train, labels) > 0.97 * len(labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l2": 0.0}, "l2 is 0.0; use a number above 0"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "1 class among 6 labels"),
        ({"labels": torch.tensor([-1, 0, 1, 0, 1, 0])}, "labels are from -1 to 1"),
        ({"num_classes": 2, "labels": torch.tensor([0, 1, 2, 0, 1, 2])}, "must be from 0 to 1"),
        ({"labels": torch.zeros(5)}, r"shape \(6, 2\) and labels \(5,\)"),
        ({"features": torch.tensor([[torch.nan, 0.0]] + [[0.0, 1.0]] * 5)}, "of 1 of 6 images"),
    ],
)
def test_bad_input_is_refused(changes, message):
    arguments = {"features": torch.eye(2).repeat(3, 1), "labels": torch.tensor([0, 1] * 3)}
    with pytest.raises(ValueError, match=message):
        fit_logistic(**arguments | {"l2": 1e-3} | changes)


def test_a_path_without_penalties_or_held_out_images_is_refused():
    x, y = torch.eye(2).repeat(3, 1), torch.tensor([0, 1] * 3)
    with pytest.raises(ValueError, match="0 penalties and 6 held-out"):
        choose_logistic(x, y, x, y, ())
    with pytest.raises(ValueError, match="0 held-out images"):
        choose_logistic(x, y, x[:0], y[:0])
    with pytest.raises(ValueError, match=r"6 held-out features .* \(5 given\)"):
        choose_logistic(x, y, x, y[:5])
