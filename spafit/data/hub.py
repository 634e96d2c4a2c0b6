"""Ask the hub for a data set with a time limit, before ``datasets`` downloads it."""

from __future__ import annotations

from spafit.errors import HubError

#: Seconds that the hub has for its first answer.
TIMEOUT_S = 10.0


def ask_for_data_set(name: str, *, revision: str | None = None, remedy: str) -> None:
    """One question with a time limit before the download: the library itself retries for half a minute.

    Args:
        name: of the data set on the hub.
        revision: branch, tag or commit.
        remedy: the sentence that says what to do where the hub cannot be reached.

    Raises:
        HubError: the hub does not answer, refuses, or has no such data set or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_S)
    except GatedRepoError as error:
        raise HubError(
            f"Data set {name!r} is gated: accept its terms on its page and log in (hf auth login)."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubError(
            f"There is no data set {name!r} on the hub and no folder of that name here; a private one needs a login."
        ) from error
    except HfHubHTTPError as error:
        raise HubError(f"The hub refused data set {name!r} ({str(error).splitlines()[0]}).") from error
    except Exception as error:
        # The HTTP library behind the hub's client changes with its version; all of them name the class so.
        if not isinstance(error, OSError) and "TransportError" not in {c.__name__ for c in type(error).__mro__}:
            raise
        raise HubError(f"The hub cannot be reached for data set {name!r}. {remedy}") from error
