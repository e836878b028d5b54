"""Accounts that survive the loss of all but one of three hosts.

Serve it, from any one host; the others start the same program:

    python ledger.py

Use it, from any process on any host of the cluster:

    from etcdreplica import connect

    with connect("ledger") as ledger:
        ledger.deposit("ann", 5)           # returns when every in-sync copy has it
        ledger.transfer("ann", "bob", 2)
        print(ledger.balance("ann"))       # 3
"""

from __future__ import annotations

from etcdreplica import protected, query, serve, update


@protected(style="hot", degree=3)
class Ledger:
    """Whole amounts of money by account."""

    def __init__(self) -> None:
        self.accounts: dict[str, int] = {}

    @update
    def deposit(self, account: str, amount: int) -> int:
        """Add to an account; return what it holds now."""
        if amount <= 0:
            raise ValueError(f"an amount must be positive, not {amount}")
        self.accounts[account] = self.balance(account) + amount
        return self.accounts[account]

    @update
    def transfer(self, source: str, target: str, amount: int) -> None:
        """Move an amount from one account to another. Everything is checked before anything is changed."""
        if amount <= 0:
            raise ValueError(f"an amount must be positive, not {amount}")
        if self.balance(source) < amount:
            raise ValueError(f"{source} has only {self.balance(source)}, not {amount}")
        self.accounts[source] -= amount
        self.accounts[target] = self.balance(target) + amount

    @query
    def balance(self, account: str) -> int:
        """Return what an account holds."""
        return self.accounts.get(account, 0)

    @query
    def total(self) -> int:
        """Return what all accounts hold together."""
        return sum(self.accounts.values())


if __name__ == "__main__":
    serve(Ledger)
